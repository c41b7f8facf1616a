"""Synthetic captions: banks, retrieval by a model, resumed columns, unreadable images, wrong input."""

import json
import sys

import jax
import numpy as np
import pytest
from helpers import tiny_config
from model_helpers import tiny_method
from PIL import Image

from clip_jax import inference, train
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.columns import ColumnsSource
from clip_jax.errors import UserError
from clip_jax.models.common import l2_normalize
from clip_jax.tools import caption as lib

COLOURS = {
    "a red square": (255, 0, 0),
    "a green square": (0, 255, 0),
    "a blue square": (0, 0, 255),
    "a white square": (255, 255, 255),
}


class Colours:
    """A model that knows the names of colours."""

    def embed_text(self, texts):
        return np.asarray(l2_normalize(np.array([COLOURS[text] for text in texts], np.float32)))

    def embed_image(self, images):
        return np.asarray(l2_normalize(np.stack([np.asarray(p, np.float32).mean((0, 1)) for p in images])))

    def similarity(self, z_image, z_text):
        return z_image @ z_text.T


def square(text):
    return {"image": np.full((4, 4, 3), COLOURS[text], np.uint8), "texts": [text, "a square"]}


SOURCE = MemorySource([square(text) for text in COLOURS] * 3, "squares")
BANK = list(COLOURS)


def captions(source, path):
    return [ColumnsSource(source, str(path))[i]["synthetic"] for i in range(len(source))]


def test_the_best_text_of_a_bank(tmp_path):
    failures = lib.run(SOURCE, str(tmp_path / "c.jsonl"), lib.Retrieval(Colours(), BANK), about={}, batch=5)
    assert not failures and captions(SOURCE, tmp_path / "c.jsonl") == BANK * 3


def test_several_texts_and_excluded_texts(tmp_path):
    lib.run(SOURCE, str(tmp_path / "several.jsonl"), lib.Retrieval(Colours(), BANK, top=2), about={})
    assert captions(SOURCE, tmp_path / "several.jsonl")[:3] == [[text, "a white square"] for text in BANK[:3]]
    own = lib.Retrieval(Colours(), BANK, own=lambda record: record["texts"])
    lib.run(SOURCE, str(tmp_path / "others.jsonl"), own, about={})
    assert (
        captions(SOURCE, tmp_path / "others.jsonl")
        == ["a white square"] * 3 + ["a red square"] + (["a white square"] * 3 + ["a red square"]) * 2
    )
    only_own = lib.Retrieval(Colours(), BANK[:1], own=lambda record: record["texts"])
    with pytest.raises(
        UserError, match="none of 1 records in a row has a caption .no text for an image: 1.; .* has 0 of 1 records"
    ):
        lib.run(MemorySource([square("a red square")]), str(tmp_path / "none.jsonl"), only_own, about={})


@pytest.mark.parametrize("lines", [1, 4, 7])
def test_the_same_command_resumes(tmp_path, lines):
    lib.run(SOURCE, str(tmp_path / "whole.jsonl"), lib.Retrieval(Colours(), BANK), about={"top": 1}, batch=5)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(whole.splitlines(True)[:lines]) + b'{"of"')
    lib.run(SOURCE, str(part), lib.Retrieval(Colours(), BANK), about={"top": 1}, batch=5)
    assert part.read_bytes() == whole
    with pytest.raises(UserError, match="made with another about"):
        lib.run(SOURCE, str(part), lib.Retrieval(Colours(), BANK, top=2), about={"top": 2})


def test_unreadable_images_have_no_caption(tmp_path):
    records = [
        square("a red square"),
        {"image": b"no image", "texts": ["x"]},
        {"texts": ["y"]},
        square("a blue square"),
    ]
    source = MemorySource(records)
    failures = lib.run(source, str(tmp_path / "c.jsonl"), lib.Retrieval(Colours(), BANK), about={})
    assert failures == {"corrupt image": 1, "no image": 1}
    assert captions(source, tmp_path / "c.jsonl") == ["a red square", "", "", "a blue square"]
    last = MemorySource([records[0], records[3], records[1]])  # the last batch is one bad record
    lib.run(last, str(tmp_path / "last.jsonl"), lib.Retrieval(Colours(), BANK), about={}, batch=2)
    assert captions(last, tmp_path / "last.jsonl") == ["a red square", "a blue square", ""]
    with pytest.raises(UserError, match="none of 1 records in a row has a caption .corrupt image: 1."):
        lib.run(MemorySource(records[1:2]), str(tmp_path / "none.jsonl"), lib.Retrieval(Colours(), BANK), about={})


def test_captions_are_on_one_line(tmp_path):
    source = MemorySource([square("a red square")] * 3)
    lib.run(source, str(tmp_path / "c.jsonl"), lambda images, of: [" a\ncat => ", ["", " b  c"], "d"], about={})
    assert captions(source, tmp_path / "c.jsonl") == ["a cat ->", ["b c"], "d"]


def test_banks(tmp_path):
    (tmp_path / "bank.txt").write_text("a cat\n\n a  dog \na cat\n")
    assert lib.read_bank(str(tmp_path / "bank.txt")) == ["a cat", "a dog"]
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    rows = [
        {"image": "x.png", "caption": "a cat", "tags": ["x", "y"]},
        {"image": "x.png", "caption": "a cat", "tags": ["y", "z"]},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert lib.read_bank(str(tmp_path / "t.jsonl")) == ["a cat"] and lib.read_bank(
        str(tmp_path / "t.jsonl"), "tags"
    ) == ["x", "y", "z"]
    for bank, field, message in (
        ("no.txt", "", "--bank=no.txt: cannot be read"),
        (str(tmp_path / "t.jsonl"), "t", "it has no text in the field 't'"),
    ):
        with pytest.raises(UserError, match=message):
            lib.read_bank(bank, field)


def test_the_captions_that_come_with_the_package():
    joined = make_source("emoji?columns=emoji_captions")
    names = {joined[i]["name"] for i in range(len(joined))}
    rows = [joined[i] for i in range(0, len(joined), 20)]
    assert all(row["synthetic"] in names for row in rows)
    own = np.mean([row["synthetic"] == row["name"] for row in rows])
    assert 0.5 < own < 0.9, "most images get their own name, but not all"


def test_the_command_with_a_checkpoint(tmp_path, capsys):
    train.train(tiny_config("train.steps=1"), tmp_path / "run", lambda line: None)
    rows = []
    for i, (text, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": text, "tags": ["red", "blue"]})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--source={tmp_path}/t.jsonl", f"--captioner=retrieval:{tmp_path}/run", f"--out={tmp_path}/c.jsonl"]
    assert lib.main([*arguments, "--bank-field=tags", "--top=2"]) == 0
    assert "4 records; 0 captions of this run are empty" in capsys.readouterr().out
    found = captions(make_source(f"{tmp_path}/t.jsonl"), tmp_path / "c.jsonl")
    assert [sorted(texts) for texts in found] == [["blue", "red"]] * 4
    assert lib.main([*arguments, "--top=5"]) == 2
    assert capsys.readouterr().err == "error: --top=5: must be from 1 to 4, the number of texts in the bank\n"


def test_a_run_with_other_weights_or_another_bank_does_not_resume(tmp_path, monkeypatch, capsys):
    config, method, params, *rest = tiny_method("clip")
    models = [inference.Model(config, method, tree, *rest) for tree in (params, jax.tree.map(np.zeros_like, params))]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    (tmp_path / "t.jsonl").write_text('{"image": "x.png", "caption": "a"}\n')
    (tmp_path / "bank.txt").write_text("a cat\n")
    arguments = ["--source=t.jsonl", "--captioner=retrieval:runs/clip", "--bank=bank.txt", "--out=c.jsonl"]
    for model, bank, status in ((0, "a cat\n", 0), (0, "a cat\n", 0), (1, "a cat\n", 2), (0, "a dog\n", 2)):
        monkeypatch.setattr(inference, "load", lambda _, model=models[model]: model)
        (tmp_path / "bank.txt").write_text(bank)
        assert lib.main(arguments) == status
        assert ("c.jsonl exists, but was made with another about" in capsys.readouterr().err) == bool(status)


def test_captions_of_an_earlier_version_are_resumed(tmp_path, monkeypatch, capsys):
    """It wrote no hashes of the weights and the bank."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), COLOURS["a red square"]).save("x.png")
    (tmp_path / "t.jsonl").write_text('{"image": "x.png", "caption": "a red square"}\n')
    key = {"model": "1", "texts": "1"}
    monkeypatch.setattr(inference, "load", lambda _: Colours())
    monkeypatch.setattr(lib.Retrieval, "key", property(lambda _: key))
    arguments = ["--source=t.jsonl", "--captioner=retrieval:runs/clip", "--out=c.jsonl"]
    assert lib.main(arguments) == 0
    whole = (tmp_path / "c.jsonl").read_text()
    header, row = whole.splitlines(keepends=True)
    old = json.loads(header)
    old["about"] = {name: value for name, value in old["about"].items() if name not in key}
    old = json.dumps(old) + "\n"
    for text in (old, old + row, header):
        (tmp_path / "c.jsonl").write_text(text)
        assert lib.main(arguments) == 0
        assert (tmp_path / "c.jsonl").read_text() == (whole if text == header else old + row)
    (tmp_path / "c.jsonl").write_text(old)
    assert lib.main([*arguments, "--exclude-own"]) == 2
    key["model"] = "2"
    (tmp_path / "c.jsonl").write_text(header)
    assert lib.main(arguments) == 2
    assert capsys.readouterr().err.count("c.jsonl exists, but was made with another about") == 2


@pytest.mark.parametrize(
    "captioner, option, kind",
    [
        *(("transformers:x", f"--{option}", "retrieval") for option in ("top=2", "bank=b.txt", "exclude-own")),
        ("retrieval:runs/clip", "--prompt=a photo of", "transformers"),
    ],
)
def test_an_option_of_another_captioner_is_refused(captioner, option, kind, capsys):
    assert lib.main(["--source=/nowhere.jsonl", "--out=c.jsonl", f"--captioner={captioner}", option]) == 2
    flag = option.partition("=")[0]
    assert capsys.readouterr().err == f"error: {flag} is for --captioner={kind}, not --captioner={captioner}\n"


@pytest.mark.parametrize(
    "captioner, message",
    [
        ("blip", "--captioner=blip: allowed are transformers:MODEL and retrieval:CHECKPOINT"),
        ("retrieval:", "--captioner=retrieval:: allowed are transformers:MODEL and retrieval:CHECKPOINT"),
        ("transformers:x", "--captioner=transformers:x: transformers is not installed: pip install torch transformers"),
        ("retrieval:nowhere", "'nowhere'"),
    ],
)
def test_wrong_captioners_are_one_line(tmp_path, capsys, monkeypatch, captioner, message):
    monkeypatch.setitem(sys.modules, "torch", sys.modules[__name__])
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("x.png")
    (tmp_path / "t.jsonl").write_text('{"image": "x.png", "caption": "a"}\n')
    assert lib.main(["--source=t.jsonl", "--out=c.jsonl", f"--captioner={captioner}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
