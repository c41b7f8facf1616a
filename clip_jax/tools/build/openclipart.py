"""Builds the embedded openclipart set: clip art with the titles that its authors gave, noise included.

    python -m clip_jax.tools.build.openclipart [--cache FOLDER] [--out FOLDER]

Needs `apt-get` to fetch the pinned Debian packages when the cache folder lacks them, `dpkg-deb` to unpack them,
Pillow and resvg-py. The texts are alt-text as ALIGN means it. More than half of the captions say nothing about their
image ("gramastar" 1,375 times, "Part of the Flat Icon Collection ..."). Others are Italian or French, carry numbers,
or name the author. None of these is removed.

The `test` split is for measurements. Its captions are informative and each of its titles belongs to one image only
(`is_informative`). It holds a fifth of such records, chosen by hash. All other records are `train`.
"""

import hashlib
import io
import re
import struct
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from clip_jax.tools.build.images import render_svg, to_webp
from clip_jax.tools.build.packages import debian, fetch
from clip_jax.tools.build.tfds_writer import command, write_dataset

VERSION = "1.0.0"
SIZE = 96
OUT = Path(__file__).parents[2] / "data" / "embedded" / "openclipart" / VERSION
PNG = debian("openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02")
SVG = debian("openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5")

_MAX_PIXELS = 5e7  # a larger PNG (up to 6e8 pixels) is not decoded; its SVG is rendered
_MIN_SIDE = 8
_BOILERPLATE = re.compile(
    r"^clipart by|^part of|clipart$|collection|theme|iconset|submission|sibmission", re.IGNORECASE
)


def read_deb(path, suffix):
    """Returns `{path below openclipart/SUFFIX, without the suffix: bytes}` of a Debian package; links are left out."""
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
    """Returns title, description and keywords of an SVG's Dublin Core metadata; what is missing is empty."""
    work = ElementTree.fromstring(svg).find(".//{*}Work")
    if work is None:
        return "", "", []

    def text(element):
        return " ".join("".join(element.itertext()).split()) if element is not None else ""

    # "hash" is an error of the program that collected the archive: a Perl reference written as text.
    keywords = dict.fromkeys(text(item) for item in work.findall("{*}subject//{*}li"))
    return (
        text(work.find("{*}title")),
        text(work.find("{*}description")),
        [k for k in keywords if k not in ("", "hash")],
    )


def letters(title):
    """Returns the words of a title in lower case without digits and punctuation, which do not distinguish titles."""
    return " ".join(re.findall(r"[^\W\d_]+", title.lower()))


def is_informative(title, count):
    """Returns whether a title describes one image: it is unique, has at least three letters, and is no boilerplate.

    Args:
      title: the title.
      count: how often its `letters` occur in the whole set.
    """
    return count == 1 and len(letters(title)) >= 3 and not _BOILERPLATE.search(title)


def in_test(path):
    """Returns whether an informative record is held out: one in five, by the first 32 bits of SHA-256 of its path."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % 5 == 0


def to_image(png, svg):
    """Returns an image without its empty margin as small WebP bytes; None when it is empty or too small."""
    from PIL import Image

    width, height = struct.unpack(">II", png[16:24])  # from the PNG header: PIL refuses to open some files
    if width * height > _MAX_PIXELS:
        png = render_svg(svg.decode(), 4 * SIZE)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getbbox()  # of the pixels that are not transparent
    if box is None or min(box[2] - box[0], box[3] - box[1]) < _MIN_SIDE:
        return None
    return to_webp(image.crop(box), SIZE)


# Part of the built files: any change changes their bytes.
DESCRIPTION = """\
Open Clip Art Library 0.18: pictures with the titles that their authors gave them, as raw as alt-text from the web. \
One record is
one distinct picture without its transparent margin, WebP, longer side at most 96 pixels. caption is the title as it \
stands, or the
description or file name where there is none; more than half of the captions in train are boilerplate. test holds out \
pictures
whose title is informative and occurs once. folder is usable as a coarse label. Read it with
tfds.builder_from_directory(folder).as_data_source(split); tf.data does not decode WebP, so give \
tfds.decode.SkipDecoding() for the
image there."""
CITATION = (
    "Open Clip Art Library, release 0.18, as packaged by Debian (openclipart 1:0.18+dfsg-19); "
    "authors in the file names."
)
LICENSE = (
    "Public domain (Creative Commons Public Domain Dedication). "
    "The pictures were cropped and resized to at most 96 pixels."
)


def records(cache):
    """Returns `{split: records}`, sorted by path."""
    pngs, svgs = read_deb(fetch(PNG, cache), "png"), read_deb(fetch(SVG, cache), "svg")
    images = {}
    for path, png in sorted(pngs.items()):
        # Where the SVG is a link, the image is a copy of another one under its own name.
        if path not in svgs:
            continue
        image = to_image(png, svgs[path])
        if image is None or image in images:
            continue
        title, description, keywords = read_metadata(svgs[path])
        images[image] = {
            "title": title,
            "description": description,
            "keywords": keywords,
            "caption": title or description or Path(path).name.replace("_", " ").strip(),
            "folder": str(Path(path).parent),
            "path": path,
        }
    counts = Counter(letters(record["title"]) for record in images.values())
    splits = {"train": [], "test": []}
    for image, record in images.items():
        title = record["title"]
        held_out = is_informative(title, counts[letters(title)]) and in_test(record["path"])
        splits["test" if held_out else "train"].append({"image": io.BytesIO(image), **record})
    return splits


def build(cache, out=OUT):
    """Builds the data set in the folder `out`; returns `{split: number of records}`."""
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
