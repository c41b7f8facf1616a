"""Builds the embedded openclipart set: clip art with the titles its authors happened to give, noise and all.

    python -m clip_jax.tools.build.openclipart [--cache FOLDER] [--out FOLDER]

Needs `apt-get` and `dpkg-deb` (to fetch the pinned Debian packages that are not in the cache folder, and to open them), Pillow and
resvg-py. This is alt-text as ALIGN means it: more than half of the captions say nothing of their picture ("gramastar" 1,375 times, "Part
of the Flat Icon Collection ..."), others are Italian or French, carry numbers, or name the author. Nothing of that is removed.

The `test` split is for measuring, so its captions are informative and its pictures are of one title only (`is_informative`): a fifth
of such records, by hash. Everything else is `train`.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from clip_jax.tools.build.packages import debian, fetch
from clip_jax.tools.build.pictures import render_svg, to_webp
from clip_jax.tools.build.tfds_writer import command, write_dataset

VERSION = "1.0.0"
SIZE = 96
OUT = Path(__file__).parents[2] / "data" / "embedded" / "openclipart" / VERSION
PNG = debian("openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02")
SVG = debian("openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5")

_MAX_PIXELS = 5e7  # larger PNGs (up to 6e8 pixels) are not decoded: their SVG is rendered
_MIN_SIDE = 8
_BOILERPLATE = re.compile(
    r"^clipart by|^part of|clipart$|collection|theme|iconset|submission|sibmission", re.IGNORECASE
)


def read_deb(path, suffix):
    """Returns path below `openclipart/png` or `openclipart/svg`, without suffix -> content; links are left out."""
    prefix = f"./usr/share/openclipart/{suffix}/"
    files = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and member.name.startswith(prefix) and member.name.endswith(f".{suffix}"):
                    files[member.name.removeprefix(prefix).removesuffix(f".{suffix}")] = archive.extractfile(
                        member
                    ).read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return files


def read_metadata(svg):
    """Returns title, description and keywords of the Dublin Core metadata inside an SVG; empty where there are none."""
    work = ElementTree.fromstring(svg).find(".//{*}Work")
    if work is None:
        return "", "", []

    def text(element):
        return " ".join("".join(element.itertext()).split()) if element is not None else ""

    # "hash" is a slip of the program that collected the archive, a Perl reference written out as text.
    keywords = dict.fromkeys(text(item) for item in work.findall("{*}subject//{*}li"))
    return (
        text(work.find("{*}title")),
        text(work.find("{*}description")),
        [k for k in keywords if k not in ("", "hash")],
    )


def letters(title):
    """Returns the words of a title in lower case, without digits and punctuation: titles that differ only in those are the same."""
    return " ".join(re.findall(r"[^\W\d_]+", title.lower()))


def is_informative(title, count):
    """Whether a title, whose `letters` occur `count` times in all, is one picture's own: unique, a word at least, no boilerplate."""
    return count == 1 and len(letters(title)) >= 3 and not _BOILERPLATE.search(title)


def in_test(path):
    """Whether an informative record is held out: the first 32 bits of SHA-256 of its path, one in five."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % 5 == 0


def to_picture(png, svg):
    """Returns the picture without its empty margin as small WebP bytes, or None if it is too small to show anything, or empty."""
    from PIL import Image

    width, height = struct.unpack(">II", png[16:24])  # of the PNG header: PIL would refuse to open some
    if width * height > _MAX_PIXELS:
        png = render_svg(svg.decode(), 4 * SIZE)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getbbox()  # of what is not transparent
    if box is None or min(box[2] - box[0], box[3] - box[1]) < _MIN_SIDE:
        return None
    return to_webp(image.crop(box), SIZE)


DESCRIPTION = """\
Open Clip Art Library 0.18: pictures with the titles that their authors gave them, as raw as alt-text from the web. One record is
one distinct picture without its transparent margin, WebP, longer side at most 96 pixels. caption is the title as it stands, or the
description or file name where there is none; more than half of the captions in train are boilerplate. test holds out pictures
whose title is informative and occurs once. folder is usable as a coarse label. Read it with
tfds.builder_from_directory(folder).as_data_source(split); tf.data does not decode WebP, so give tfds.decode.SkipDecoding() for the
image there."""
CITATION = "Open Clip Art Library, release 0.18, as packaged by Debian (openclipart 1:0.18+dfsg-19); authors in the file names."
LICENSE = "Public domain (Creative Commons Public Domain Dedication). The pictures were cropped and resized to at most 96 pixels."


def records(cache):
    """Returns split name -> records, by path."""
    pngs, svgs = read_deb(fetch(PNG, cache), "png"), read_deb(fetch(SVG, cache), "svg")
    pictures = {}
    for path, png in sorted(pngs.items()):
        # Where the SVG is only a link, the picture is a copy of another one under its own name.
        if path not in svgs:
            continue
        picture = to_picture(png, svgs[path])
        if picture is None or picture in pictures:
            continue
        title, description, keywords = read_metadata(svgs[path])
        pictures[picture] = {
            "title": title,
            "description": description,
            "keywords": keywords,
            "caption": title or description or Path(path).name.replace("_", " ").strip(),
            "folder": str(Path(path).parent),
            "path": path,
        }
    counts = Counter(letters(record["title"]) for record in pictures.values())
    splits = {"train": [], "test": []}
    for picture, record in pictures.items():
        title = record["title"]
        held_out = is_informative(title, counts[letters(title)]) and in_test(record["path"])
        splits["test" if held_out else "train"].append({"image": io.BytesIO(picture), **record})
    return splits


def build(cache, out=OUT):
    """Builds the data set into `out`; returns split name -> number of records."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    return write_dataset(
        out,
        name="openclipart",
        version=VERSION,
        features={
            "image": tfds.features.Image(shape=(None, None, 4)),
            "title": text,
            "description": text,
            "keywords": tfds.features.Sequence(text),
            "caption": text,
            "folder": text,
            "path": text,
        },
        splits=records(cache),
        description=DESCRIPTION,
        homepage="https://packages.debian.org/openclipart",
        citation=CITATION,
        license_text=LICENSE,
    )


if __name__ == "__main__":
    command(__doc__, build, OUT)
