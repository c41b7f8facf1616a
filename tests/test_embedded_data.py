"""The embedded data sets as committed, and the scripts that make them (on tiny packages, without network)."""

import collections
import io
import json
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.tools.build import emoji, iconify, images, openclipart, packages
from clip_jax.tools.build.tfds_writer import write_dataset

REPO = Path(__file__).parent.parent
SEEN = {"noto", "noto_v1", "fluent_3d", "fluent_flat", "twemoji"}


def read(folder, decode_image=False):
    """Split name -> records of a prepared TFDS folder, texts as str."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    decoders = None if decode_image else {"image": tfds.decode.SkipDecoding()}

    def text(value):
        return [v.decode() for v in value] if isinstance(value, list) else value.decode()

    return {
        split: [
            {k: v if k == "image" else text(v) for k, v in record.items()}
            for record in builder.as_data_source(split, decoders=decoders)
        ]
        for split in builder.info.splits
    }


@pytest.fixture(scope="module")
def emoji_splits():
    return read(emoji.OUT)


@pytest.fixture(scope="module")
def openclipart_splits():
    return read(openclipart.OUT)


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*"))


# --- the emoji set as committed ---------------------------------------------------------------------------------------


def test_emoji_counts(emoji_splits):
    assert {split: len(records) for split, records in emoji_splits.items()} == {
        "train": 6727,
        "train_unseen_vendor": 1092,
        "val_seen_vendor": 870,
        "val_unseen_vendor": 137,
        "test_seen_vendor": 906,
        "test_unseen_vendor": 138,
    }
    vendors = collections.Counter(r["vendor"] for records in emoji_splits.values() for r in records)
    assert vendors == {
        "noto": 1910,
        "noto_v1": 1236,
        "fluent_3d": 1852,
        "fluent_flat": 1594,
        "twemoji": 1911,
        "emojione_v2": 1367,
    }
    assert "tensorflow" not in sys.modules


def test_emoji_split_by_concept_and_vendor(emoji_splits):
    families, images_of = collections.defaultdict(set), collections.defaultdict(set)
    for split, records in emoji_splits.items():
        assert {r["vendor"] for r in records} == ({"emojione_v2"} if split.endswith("unseen_vendor") else SEEN)
        part = split.split("_")[0]
        for record in records:
            assert emoji.split_of(record["concept"], record["vendor"]) == split
            families[part].add(emoji.concept_family(record["concept"]))
            images_of[part].add(record["image"])
    for values in (families, images_of):
        assert values.keys() == {"train", "val", "test"}
        assert (
            not values["train"] & values["val"]
            and not values["train"] & values["test"]
            and not values["val"] & values["test"]
        )
    names = {r["name"] for part in ("val", "test") for r in emoji_splits[f"{part}_seen_vendor"]}
    assert not names & {r["name"] for r in emoji_splits["train"]}


def test_emoji_images(emoji_splits):
    for records in emoji_splits.values():
        for record in records:
            image = Image.open(io.BytesIO(record["image"]))
            assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGBA"), record["name"]
            assert np.asarray(image)[..., 3].max() > 100, record["name"]  # something is to be seen


def test_emoji_texts(emoji_splits):
    seen = set()
    for records in emoji_splits.values():
        for record in records:
            assert all(record[field].strip() for field in ("vendor", "concept", "name", "group", "subgroup")), record[
                "concept"
            ]
            assert record["tags"] and all(record["tags"]), record["concept"]
            assert all(keyword == " ".join(keyword.split()) != "" for keyword in record["keywords"]), record["concept"]
            seen.add((record["concept"], record["vendor"]))
    assert len(seen) == sum(map(len, emoji_splits.values()))
    assert (
        len({r["name"] for records in emoji_splits.values() for r in records if not r["keywords"]}) == 12
    )  # emojilib has none
    octopus = next(r for records in emoji_splits.values() for r in records if r["concept"] == "1F419")
    assert octopus["name"] == "octopus" and octopus["tags"] == ["animal", "creature", "ocean"]
    assert octopus["group"] == "animals-nature" and octopus["subgroup"] == "animal-marine"


def test_emoji_names_in_all_languages(emoji_splits):
    data = json.loads(lzma.decompress((emoji.OUT / "names_i18n.json.xz").read_bytes()))
    assert len(data["locales"]) == 28
    english, korean = data["locales"].index("en"), data["locales"].index("ko")
    assert data["names"]["1F419"][korean] == "문어"
    for records in emoji_splits.values():
        for record in records:
            names = data["names"][record["concept"]]
            assert len(names) == 28 and all(names) and names[english] == record["name"]


def test_emoji_default_decoding():
    import tensorflow_datasets as tfds

    record = tfds.builder_from_directory(emoji.OUT).as_data_source("val_unseen_vendor")[0]
    assert record["image"].shape == (64, 64, 4) and record["image"].dtype == np.uint8


# --- the openclipart set as committed ---------------------------------------------------------------------------------


def test_openclipart_counts_and_images(openclipart_splits):
    assert {split: len(records) for split, records in openclipart_splits.items()} == {"train": 6356, "test": 450}
    records = [r for records in openclipart_splits.values() for r in records]
    assert len({r["image"] for r in records}) == len({r["path"] for r in records}) == len(records)
    for record in records:
        image = Image.open(io.BytesIO(record["image"]))
        assert image.mode == "RGBA" and 1 <= min(image.size) and max(image.size) <= 96, record["path"]
        assert record["caption"].strip() and record["folder"] and record["path"].startswith(record["folder"] + "/")
        assert record["caption"] == record["title"] or not record["title"]
        assert "" not in record["keywords"] and "hash" not in record["keywords"]


def test_openclipart_noise_and_test_split(openclipart_splits):
    train, test = openclipart_splits["train"], openclipart_splits["test"]
    counts = collections.Counter(openclipart.letters(r["title"]) for r in train + test)
    assert counts["gramastar"] == 1375
    uninformative = sum(
        not openclipart.is_informative(r["title"], counts[openclipart.letters(r["title"])]) for r in train
    )
    assert 0.5 < uninformative / len(train) < 0.8
    for record in test:
        assert openclipart.is_informative(record["title"], counts[openclipart.letters(record["title"])])
        assert openclipart.in_test(record["path"])


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "limit"), [(emoji.OUT, 14e6), (openclipart.OUT, 12e6)], ids=["emoji", "openclipart"]
)
def test_size_and_metadata(folder, limit):
    import tensorflow_datasets as tfds

    assert folder_bytes(folder) <= limit
    info = tfds.builder_from_directory(folder).info
    assert info.description and info.citation and info.homepage and info.redistribution_info.license
    assert info.version == folder.name and info.name == folder.parent.name


def test_notice_names_every_source():
    notice = (REPO / "NOTICE").read_text(encoding="utf-8")
    vendors = [line.split()[0] for line in notice.splitlines() if line and not line.startswith(" ")]
    for vendor in emoji.VENDORS:
        assert vendor.name in vendors
        assert f"{vendor.package.name} {vendor.package.version}" in notice
    for name in ("CLDR", "emojibase", "emojilib", "openclipart"):
        assert name in vendors
    assert "resized" in notice and "CC-BY-SA" not in notice


# --- concepts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "hexcodes"),
    [
        ("1F9D1-1F692", ["1F9D1-200D-1F692", "1F469-200D-1F692", "1F468-1F3FD-200D-1F692"]),  # firefighters
        ("1F3C3", ["1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FB-200D-2642-FE0F-200D-27A1-FE0F"]),  # running
        ("1F9D1", ["1F9D1", "1F468", "1F469-1F3FF"]),
        ("1F9D2", ["1F9D2", "1F466", "1F467"]),
        ("1F9D1-1F9B0", ["1F468-200D-1F9B0", "1F469-200D-1F9B0"]),  # red hair
        ("1F9D1-1F91D", ["1F46B", "1F46D", "1F9D1-200D-1F91D-200D-1F9D1"]),  # holding hands
        ("1F491", ["1F491", "1F469-200D-2764-FE0F-200D-1F468"]),
        ("1F48F", ["1F48F", "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468"]),
        ("1F46A", ["1F46A", "1F468-200D-1F469-200D-1F466", "1F9D1-200D-1F9D2"]),
        ("1F385", ["1F385", "1F936", "1F9D1-200D-1F384"]),  # Santa Claus
        ("1F408", ["1F408", "1F408-200D-2B1B"]),  # cat, black cat
        ("2764", ["2764-FE0F", "2764-FE0F-200D-1F525"]),
        ("0031", ["0031-FE0F-20E3"]),
        ("1F3FB", ["1F3FB"]),  # a skin tone on its own
        ("2640", ["2640-FE0F"]),
        ("27A1", ["27A1-FE0F"]),
        ("1F1F0-1F1F7", ["1F1F0-1F1F7"]),
        ("1F1F3-1F1F4", ["1F1F3-1F1F4", "1F1E7-1F1FB"]),  # Bouvet Island flies Norway's flag
        ("1F3F3-200D-1F308", ["1F3F3-FE0F-200D-1F308"]),
        ("1F3F4", ["1F3F4"]),
    ],
)
def test_concept_family(family, hexcodes):
    assert {emoji.concept_family(hexcode) for hexcode in hexcodes} == {family}
    assert len({emoji.concept_split(hexcode) for hexcode in hexcodes}) == 1


def test_concept_split_is_stable_and_80_10_10():
    # Changing any of these would silently mix seen and unseen concepts of released checkpoints.
    splits = {"1F419": "train", "1F600": "train", "1F1F0-1F1F7": "train", "1F643": "test", "2764-FE0F": "val"}
    assert {hexcode: emoji.concept_split(hexcode) for hexcode in splits} == splits
    shares = collections.Counter(emoji.concept_split(f"{point:X}") for point in range(0x20000, 0x24000))
    total = sum(shares.values())
    assert shares["train"] / total == pytest.approx(0.8, abs=0.02) and shares["val"] / total == pytest.approx(
        0.1, abs=0.02
    )
    assert (
        emoji.split_of("1F419", "noto") == "train" and emoji.split_of("1F419", "emojione_v2") == "train_unseen_vendor"
    )
    assert (
        emoji.split_of("1F643", "noto") == "test_seen_vendor"
        and emoji.split_of("1F643", "emojione_v2") == "test_unseen_vendor"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("octopus", ["octopus"]),
        ("smiling face with heart-eyes", ["smiling-face-with-heart-eyes"]),
        ("flag: Côte d’Ivoire", ["flag-cote-divoire", "flag-for-cote-divoire"]),
        ("flag: U.S. Virgin Islands", ["flag-us-virgin-islands", "flag-for-us-virgin-islands"]),
        ("flag: Bosnia & Herzegovina", ["flag-bosnia-and-herzegovina", "flag-for-bosnia-and-herzegovina"]),
        ("bullseye", ["bullseye", "direct-hit"]),
        ("keycap: #", ["keycap-pound"]),
        ("cricket", []),
    ],
)
def test_slugs(name, expected):
    assert iconify.slugs(name) == expected


# --- reading packages -------------------------------------------------------------------------------------------------


def make_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def concept(hexcode, name):
    return emoji.Concept(hexcode, name, [], [], "", "", [])


CONCEPTS = [
    concept("1F419", "octopus"),
    concept("2600-FE0F", "sun"),
    concept("1F997", "cricket"),
    concept("1F3AF", "bullseye"),
]
ICONS = {
    "prefix": "p",
    "width": 32,
    "height": 32,
    "icons": {"octopus": {"body": "<o/>"}, "cricket": {"body": "<c/>"}, "direct-hit": {"body": "<d/>", "height": 40}},
    "aliases": {"sun": {"parent": "octopus", "hFlip": True}, "turned": {"parent": "octopus", "rotate": 1}},
}


def test_iconify_by_slug_and_by_code_point(tmp_path):
    icons = json.dumps(ICONS).encode()
    by_slug = make_tar(tmp_path / "slug.tgz", {"icons.json": icons, "chars.json": b"{}"})
    assert [c.name for c, _ in emoji.iconify(by_slug, CONCEPTS)] == ["octopus", "sun", "bullseye"]
    by_point = make_tar(
        tmp_path / "point.tgz", {"icons.json": icons, "chars.json": b'{"2600": "cricket", "1f419": "unknown"}'}
    )
    assert [c.name for c, _ in emoji.iconify(by_point, CONCEPTS)] == ["sun"]


def test_iconify_svg():
    assert 'viewBox="0 0 32 32"><o/></svg>' in iconify.to_svg(ICONS, "octopus", 64)
    assert 'viewBox="0 0 32 40"><d/></svg>' in iconify.to_svg(ICONS, "direct-hit", 64)
    assert '<g transform="translate(32 0) scale(-1 1)"><o/></g>' in iconify.to_svg(ICONS, "sun", 64)
    with pytest.raises(UserError, match="'rotate' is not supported"):
        iconify.to_svg(ICONS, "turned", 64)


def test_image_files(tmp_path):
    png = io.BytesIO()
    Image.new("RGBA", (5, 5), "red").save(png, "PNG")
    path = make_tar(tmp_path / "p.tgz", {"img/2600.png": png.getvalue(), "other/1f419.png": b"no image"})
    [(found, image)] = emoji.image_files("package/img")(path, CONCEPTS)
    assert found.name == "sun" and image().size == (5, 5)


def test_fetch(tmp_path, monkeypatch):
    package = packages.npm("@scope/name", "1.0.0", "0" * 64)
    assert package.filename == "scope-name-1.0.0.tgz"
    assert packages.debian("x", "1:2-3", "").filename == "x_1%3a2-3_all.deb"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cannot fetch @scope/name 1.0.0: npm pack"):
        packages.fetch(package, tmp_path)
    (tmp_path / package.filename).write_bytes(b"another file")
    with pytest.raises(UserError, match="its SHA-256 is"):
        packages.fetch(package, tmp_path)


def test_openclipart_metadata():
    svg = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
      xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns="http://web.resource.org/cc/"/>"""
    svg = svg.replace(
        b' xmlns="http://web.resource.org/cc/"/>',
        b"""><metadata><rdf:RDF xmlns="http://web.resource.org/cc/"><Work>
      <dc:creator><Agent><dc:title>Somebody</dc:title></Agent></dc:creator><dc:title> A red
      fox </dc:title><dc:subject><rdf:Bag><rdf:li>fox</rdf:li><rdf:li></rdf:li><rdf:li>hash</rdf:li>
      <rdf:li>fox</rdf:li></rdf:Bag>
      </dc:subject></Work></rdf:RDF></metadata></svg>""",
    )
    assert openclipart.read_metadata(svg) == ("A red fox", "", ["fox"])
    assert openclipart.read_metadata(b"<svg/>") == ("", "", [])


def test_openclipart_informative():
    assert openclipart.letters("Clock_12 (B and W)") == "clock b and w"
    assert openclipart.is_informative("Apple Core", 1)
    for title, count in (
        ("Apple Core", 2),
        ("", 1),
        ("R2", 1),
        ("Lemon SVG theme", 1),
        ("Clipart by Nicu Buculei - bee", 1),
    ):
        assert not openclipart.is_informative(title, count)


# --- images and the writer ------------------------------------------------------------------------------------------


def test_openclipart_to_image():
    canvas = Image.new("RGBA", (400, 300))
    assert openclipart.to_image(to_png(canvas), b"") is None  # nothing to be seen
    canvas.paste((255, 0, 0, 255), (100, 100, 300, 200))
    image = Image.open(io.BytesIO(openclipart.to_image(to_png(canvas), b"")))
    assert image.size == (96, 48) and image.mode == "RGBA"
    assert openclipart.to_image(to_png(Image.new("RGB", (100, 4))), b"") is None  # too thin


def test_giant_png_is_never_decoded():
    pytest.importorskip("resvg_py")
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30_000).to_bytes(4, "big") * 2  # only the header of a billion pixels
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="2" height="1" fill="blue"/></svg>'
    assert Image.open(io.BytesIO(openclipart.to_image(png, svg))).size == (96, 48)


def test_rendering_svg():
    pytest.importorskip("resvg_py")
    image = Image.open(
        io.BytesIO(
            images.render_svg(iconify.to_svg(ICONS | {"icons": {"a": {"body": '<path d="M0 0h16v32H0"/>'}}}, "a", 64))
        )
    )
    assert image.size == (64, 64) and image.getpixel((10, 30)) == (0, 0, 0, 255) and image.getpixel((50, 30))[3] == 0


def test_rendering_svg_without_resvg(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match="pip install resvg-py"):
        images.render_svg("<svg/>")


def to_png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_to_webp_sizes_and_channels():
    def size_and_mode(image):
        image = Image.open(io.BytesIO(images.to_webp(image, 64)))
        return image.size, image.mode

    assert size_and_mode(Image.new("RGB", (200, 100), "red")) == ((64, 32), "RGBA")  # opaque, yet four channels
    assert size_and_mode(Image.new("RGBA", (10, 20), (1, 2, 3, 4))) == ((10, 20), "RGBA")  # never enlarged
    assert size_and_mode(Image.new("L", (1000, 2))) == ((64, 1), "RGBA")
    square = images.to_square(Image.new("RGB", (10, 20), "red"))
    assert (
        square.size == (20, 20) and square.getpixel((2, 10))[3] == 0 and square.getpixel((10, 10)) == (255, 0, 0, 255)
    )


def test_shrinking_keeps_edges_clean():
    image = Image.new("RGBA", (256, 256), (0, 255, 0, 0))  # transparent green around opaque red
    image.paste((255, 0, 0, 255), (64, 64, 192, 192))
    pixels = np.asarray(Image.open(io.BytesIO(images.to_webp(image, 32))).convert("RGBA")).astype(int)
    assert pixels[..., 1][pixels[..., 3] > 40].max() < 100


def tiny(folder, splits, **changes):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 4)),
        "name": tfds.features.Text(),
        "tags": tfds.features.Sequence(tfds.features.Text()),
    }
    arguments = dict(
        name="tiny", version="2.1.0", features=features, description="d", homepage="h", citation="c", license_text="l"
    )
    return write_dataset(folder, splits=splits, **(arguments | changes))


def tiny_records(names):
    webp = images.to_webp(Image.new("RGBA", (4, 6), (255, 0, 0, 128)), 64)
    return [{"image": io.BytesIO(webp), "name": name, "tags": list(name)} for name in names]


def test_writer_round_trip(tmp_path):
    folder = tmp_path / "tiny" / "2.1.0"
    counts = tiny(
        folder, {"train": tiny_records(["é문어", "", "cc"]), "test": tiny_records(["d"])}, extra_files={"extra": b"1"}
    )
    assert counts == {"train": 3, "test": 1} and (folder / "extra").read_bytes() == b"1"
    splits = read(folder)
    assert [r["name"] for r in splits["train"]] == ["é문어", "", "cc"] and [r["name"] for r in splits["test"]] == ["d"]
    assert [r["tags"] for r in splits["train"]] == [["é", "문", "어"], [], ["c", "c"]]
    assert read(folder, decode_image=True)["test"][0]["image"].shape == (6, 4, 4)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["2.1.0"]


def test_writer_is_reproducible_and_replaces(tmp_path):
    def content(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    for name in ("a", "b"):
        tiny(tmp_path / name, {"train": tiny_records("xyz")})
    assert content(tmp_path / "a") == content(tmp_path / "b")
    before = content(tmp_path / "a")
    with pytest.raises(ValueError, match="split 'train' of 'tiny' has no records"):
        tiny(tmp_path / "a", {"train": []})
    assert content(tmp_path / "a") == before  # a failure leaves what was there
    tiny(tmp_path / "a", {"other": tiny_records("x")})
    assert "tiny-train.array_record-00000-of-00001" not in content(tmp_path / "a")
