"""Regions of images: the view that reads them, the command that computes their features, and invalid boxes."""

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.records import BadRecord
from clip_jax.data.sources import MemorySource
from clip_jax.data.sources.columns import ColumnsSource
from clip_jax.data.views import PIXEL_FEATURES, RegionView, read_boxes
from clip_jax.errors import UserError
from clip_jax.methods.frozen_encoders import PixelEncoder
from clip_jax.tools import regions


def image(width=8, height=4):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 255  # the left half is white
    return pixels


def record(boxes=((0, 0, 4, 4), (4, 0, 8, 2)), **fields):
    return {"image": image(), "texts": ["a text"], "boxes": np.array(boxes, np.float32), **fields}


PIXELS = RegionView(count=3, width=PIXEL_FEATURES + 4, features="pixels")


def test_pixels_and_boxes_of_regions():
    rows = PIXELS(record(), None)
    assert rows.shape == (3, 196) and rows.dtype == np.float32
    assert (rows[0, :-4] == 1).all() and (rows[1, :-4] == -1).all() and not rows[2].any()
    np.testing.assert_allclose(rows[:2, -4:], [[0, 0, 0.5, 1], [0.5, 0, 1, 0.5]])


def test_features_of_the_record():
    view, features = RegionView(count=3, width=6), np.arange(6, dtype=np.float16).reshape(3, 2)
    boxes = [[0, 0, 4, 4], [0, 0, 0, 0], [4, 0, 8, 2]]  # the second row is no region
    rows = view(record(boxes, regions=features), None)
    np.testing.assert_allclose(rows[:, :2], [[0, 1], [4, 5], [0, 0]])
    np.testing.assert_allclose(RegionView(count=1, width=6)(record(boxes, regions=features), None), rows[:1])
    as_lists = {
        key: value.tolist() for key, value in (("boxes", np.array(boxes)), ("regions", features))
    }  # as in a manifest
    np.testing.assert_allclose(view(record() | as_lists, None), rows)
    with pytest.raises(BadRecord, match="fewer features than regions"):
        view(record(boxes, regions=features[:2]), None)


def test_an_image_without_regions_has_rows_of_zeros():
    for given in (record(np.zeros((0, 4))), record(np.zeros((2, 4))), {"image": image(), "texts": ["a text"]}):
        rows = PIXELS(given, None)
        assert rows.shape == (3, 196) and not rows.any()


def test_boxes_are_cut_at_the_edges_and_refused_beyond_them():
    np.testing.assert_allclose(PIXELS(record([[-3, -1, 4, 9]]), None)[0, -4:], [0, 0, 0.5, 1])
    for box in ([8, 0, 12, 4], [4, 0, 2, 4], [0, 4, 4, 4], [0, 0, np.nan, 4]):
        with pytest.raises(BadRecord, match="region outside of its image"):
            PIXELS(record([box]), None)


@pytest.mark.parametrize(
    "boxes, message",
    [
        ("0 0 4 4", "does not hold lists of 4 numbers"),
        ([[0, 0, 4], [0, 0, 4, 4]], "does not hold lists of 4 numbers"),
        ([0, 0, 4, 4], r"holds an array \[4\], but \[regions, 4\] is needed"),
        ([[0, 0, 4, 4, 1]], r"holds an array \[1, 5\]"),
    ],
)
def test_other_arrays_are_refused(boxes, message):
    with pytest.raises(UserError, match=message):
        PIXELS(record() | {"boxes": boxes}, None)


def test_the_command_writes_columns_that_the_view_reads(tmp_path, capsys):
    source = MemorySource(
        [record(), record([[2, 0, 6, 4]]), record([[9, 0, 12, 4]]), {"image": b"broken", "texts": [""]}], name="memory"
    )
    failures = regions.run(
        source, str(tmp_path / "c"), PixelEncoder(), {}, count=3, batch=2, about={"encoder": "pixels"}
    )
    assert failures == {"region outside of its image": 1, "corrupt image": 1}
    joined = ColumnsSource(source, str(tmp_path / "c"))
    assert joined[0]["regions"].shape == (3, 768) and joined[0]["boxes"].shape == (3, 4)
    crop = Image.fromarray(image()).resize((16, 16), box=(2, 0, 6, 4))
    expected = PixelEncoder().embed_image({}, np.asarray(crop)[None])
    np.testing.assert_allclose(joined[1]["regions"][0], expected[0], atol=1e-3)
    rows = RegionView(count=3, width=772)(joined[1], None)
    np.testing.assert_allclose(rows[0, -4:], [0.25, 0, 0.75, 1])
    assert not rows[1:].any() and not RegionView(count=3, width=772)(joined[2], None).any()


def test_a_grid_instead_of_boxes(tmp_path):
    boxes = regions.grid_boxes(8, 4, 2)
    np.testing.assert_allclose(boxes, [[0, 0, 8, 4], [0, 0, 4, 2], [4, 0, 8, 2], [0, 2, 4, 4], [4, 2, 8, 4]])
    source = MemorySource([{"image": image(), "texts": ["a text"]}], name="memory")
    assert not regions.run(source, str(tmp_path / "c"), PixelEncoder(), {}, grid=2, count=10)
    np.testing.assert_allclose(read_boxes(ColumnsSource(source, str(tmp_path / "c"))[0], "boxes", (8, 4)), boxes)


def test_wrong_input_is_one_line(tmp_path, capsys):
    source = MemorySource([record()], name="memory")
    with pytest.raises(
        UserError, match="no record has the field 'box' of --boxes .did you mean 'boxes'.*--grid=3 needs none"
    ):
        regions.run(source, str(tmp_path / "c"), PixelEncoder(), {}, boxes="box")
    with pytest.raises(UserError, match="no image has a region"):
        regions.run(MemorySource([record(np.zeros((0, 4)))], name="memory"), str(tmp_path / "c"), PixelEncoder(), {})
    assert not (tmp_path / "c" / "header.json").exists()
    command = ["--source=emoji", "--encoder=pixels", f"--out={tmp_path}/c"]
    assert regions.main([*command, "--count=0"]) == 2
    assert regions.main([*command]) == 2
    assert regions.main([*command[:1], "--encoder=nowhere", f"--out={tmp_path}/c", "--grid=1"]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert [line.split(":")[0] for line in lines] == ["error"] * 3 and "no record has the field 'boxes'" in lines[1]
