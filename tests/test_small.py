"""The variants `:small`, held-out records, and own data in the default configurations; one whole run from a table."""

import json

import numpy as np
import pytest
from conftest import REPO

from clip_jax import config, own_data, small
from clip_jax.data.records import image_key
from clip_jax.data.sources import MemorySource, configured_source, holdout, make_source
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.errors import UserError

CONFIGS = sorted({path.stem for path in (REPO / "configs").glob("*.py")} - {"classify"})  # it tunes weights
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}


def write_pictures(folder, count=64, first=0):
    """Writes pictures and the table pairs.tsv; their shorter side is 70 pixels."""
    from PIL import Image

    rng, rows = np.random.default_rng(first), ["filepath\tcaption"]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        name = list(COLOURS)[number % len(COLOURS)]
        pixels = np.clip(rng.normal(COLOURS[name], 8, (70, 90, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        rows.append(f"images/{number}.png\ta plain surface in {name}")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return str(folder / "pairs.tsv")


def paths(source):
    return [source[i]["path"] for i in range(len(source))]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


# The held-out records


def test_the_hash_of_the_image_decides(table):
    out, rest = (make_source(f"{table}?holdout={value}") for value in ("0.25", "!0.25"))
    everything = make_source(table)
    wanted = [r["path"] for r in map(everything.__getitem__, range(64)) if image_key(r["image"]) / 2**64 < 0.25]
    assert paths(out) == wanted and 5 < len(out) < 30
    assert sorted(paths(out) + paths(rest)) == sorted(paths(everything))
    assert set(paths(out)) < set(paths(make_source(f"{table}?holdout=0.5")))
    assert set(paths(out)) != set(paths(make_source(f"{table}?holdout=0.25:bank")))


def test_order_and_growth_move_no_record(tmp_path, table):
    out = {record.rpartition("/")[2] for record in paths(make_source(f"{table}?holdout=0.3"))}
    grown = write_pictures(tmp_path, 64)
    write_pictures(tmp_path, 32, first=64)
    rows = (tmp_path / "pairs.tsv").read_text().splitlines()
    first = [f"images/{number}.png\tx" for number in range(64)]
    (tmp_path / "pairs.tsv").write_text("\n".join([rows[0], *reversed(first), *rows[1:]]) + "\n")
    found = {record.rpartition("/")[2] for record in paths(make_source(f"{grown}?holdout=0.3"))}
    assert out == {name for name in found if int(name.removesuffix(".png")) < 64} and out < found


def test_equal_images_are_on_one_side_in_all_parts_of_a_mixture():
    images = [np.full((4, 4, 3), value, np.uint8) for value in range(40)]
    sources = [MemorySource([{"image": image, "texts": [name]} for image in images * 2], name=name) for name in "ab"]
    mixture = holdout.join(MixtureSource(sources, [3.0, 1.0]), "0.4")
    assert mixture.weights == [3.0, 1.0] and len(mixture.sources) == 2
    of_part = [sorted(int(s[i]["image"][0, 0, 0]) for i in range(len(s))) for s in mixture.sources]
    assert of_part[0] == of_part[1] and of_part[0] == sorted(2 * sorted(set(of_part[0])))


def test_a_large_table_is_divided_by_its_paths(table, monkeypatch, caplog):
    monkeypatch.setattr(holdout, "IMAGES", 10)
    monkeypatch.setattr("clip_jax.data.sources.table.read_file", lambda path: pytest.fail(f"reads {path}"))
    hashes = holdout.hashes_of(make_source(table))
    assert hashes.tolist() == [holdout.hash64(f"images/{i}.png".encode()) for i in range(64)]


def test_hashes_are_kept_in_the_cache_folder(table, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(holdout, "CACHED", 10)
    monkeypatch.setattr(holdout, "_hashes", {})
    found = holdout.hashes_of(make_source(table))
    monkeypatch.setattr(holdout, "_hashes", {})
    monkeypatch.setattr(holdout, "_of_images", lambda source: pytest.fail("reads the images again"))
    assert (holdout.hashes_of(make_source(table)) == found).all()


@pytest.mark.parametrize("value", ["2", "0", "0.0", "x", "0.5:a b"])
def test_a_wrong_share_is_one_line(table, value):
    with pytest.raises(UserError, match=r"it is written as holdout=0\.1"):
        make_source(f"{table}?holdout={value}")


def test_too_few_records_to_hold_one_out(tmp_path):
    spec = write_pictures(tmp_path, 1)
    with pytest.raises(UserError, match="no record is left of 1; set another share"):
        for share in ("0.001", "!0.999"):
            make_source(f"{spec}?holdout={share}")


def test_training_reads_the_rest_of_each_part(table):
    data = dict(split="train", image="", text="", label="", holdout=0.25)
    source = configured_source(data | {"source": f"{table}*3 + {table}?has=caption*size"})
    rest = paths(make_source(f"{table}?holdout=!0.25"))
    assert [paths(part) for part in source.sources] == [rest, rest] and source.weights == [3.0, len(rest)]


# The fields that follow from the data


def test_fields_follow_from_the_data(table):
    lines, c = [], config.load(str(REPO / "configs" / "clip.py:small"), [f"data={table}", "optim.warmup_steps=7"])
    fitted = small.fitted(c, None, lines.append)
    count = len(make_source(f"{table}?holdout=!0.1"))
    assert (fitted.model.image.size, fitted.model.image.patch) == (64, 8)  # the shorter side has 70 pixels
    assert fitted.data.batch_size == 16 and fitted.train.steps == 20_000 // 16  # fewer than 20,000 examples otherwise
    assert (fitted.optim.warmup_steps, fitted.eval.steps) == (7, -(-fitted.train.steps // 4))
    assert fitted.model.text.context == 16  # "a plain surface in yellow" has 8 tokens, 16 is the least
    assert fitted.eval.tasks == (f"retrieval(source='{table}?holdout=0.1', split='train', name='held_out')",)
    assert fitted.small.fields == () and any(f"of {count:,} records" in line for line in lines)
    config.validate(fitted)


def test_a_run_keeps_its_fields(table, tmp_path):
    c = config.load(str(REPO / "configs" / "clip.py:small"), [f"data={table}"])
    stored = small.fitted(c, None, lambda line: None).unlock()
    stored.model.image.size, stored.train.steps = 96, 77
    (tmp_path / "config.json").write_text(config.to_json(stored))
    again = small.fitted(c, tmp_path, lambda line: None)
    assert (again.model.image.size, again.train.steps) == (96, 77)


def test_the_configuration_beside_third_party_weights_is_no_run(table, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.safetensors").touch()
    c = config.load(str(REPO / "configs" / "lit.py:small"), [f"data={table}", f"init_from={tmp_path}"])
    fitted = small.fitted(c, None, lambda line: None)
    assert (fitted.model.image.size, fitted.model.image.patch) == (64, 8)  # by the data


def test_classes_are_evaluated_zero_shot(tmp_path):
    write_pictures(tmp_path / "all")
    for name in COLOURS:
        (tmp_path / "classes" / name).mkdir(parents=True)
    for number in range(64):
        picture = tmp_path / "all" / "images" / f"{number}.png"
        picture.rename(tmp_path / "classes" / list(COLOURS)[number % 4] / picture.name)
    c = config.load(str(REPO / "configs" / "clip.py:small"), [f"data={tmp_path}/classes"])
    (task,) = small.held_out_tasks(c.data)[0]  # the captions are the names of the classes
    assert task == f"zeroshot(source='{tmp_path}/classes?holdout=0.1', split='train', name='held_out')"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_small_configuration_builds(name, table):
    """Loads, takes its fields from the data, and has the shapes of a step."""
    import jax

    from clip_jax import program, train
    from clip_jax.training.step import make_init, state_shapes

    c = config.load(str(REPO / "configs" / f"{name}.py:small"), [f"data={table}", "data.batch_size=4"])
    assert "emoji" not in config.to_json(c).replace("emoji_4k", "")
    if c.small.needs:
        with pytest.raises(UserError, match="this variant needs .*: python -m clip_jax"):
            train.make_parts(c)
        if c.small.needs[0] != "init_from":
            assert program.make_program(c).state is not None
            return
        c.small.needs = ()
    parts, _, _, method = train.make_parts(c)
    init, _ = make_init(parts, method, method.batch_spec(4))
    state = state_shapes(init)
    assert 2e6 < sum(x.size for x in jax.tree.leaves(state.params)) < 6e6
    assert any("holdout=0.1" in task for task in parts.eval.tasks)


def test_small_needs_data():
    with pytest.raises(UserError, match="name your data: --config.data=PATH"):
        small.fitted(config.load(str(REPO / "configs" / "siglip.py:small")))


# Own data in the default configurations


def test_own_data_leaves_out_what_belongs_to_the_emoji():
    spec = str(REPO / "configs" / "clip.py")
    c = config.load(spec, ["data=pairs.tsv"])
    assert (c.data.templates, c.data.word_dropout, c.eval.tasks, c.eval.train_tasks) == ((), 0.0, (), ())
    c = config.load(spec, ["data.source=pairs.tsv", "data.templates=('{title}',)", "eval.tasks=emoji"])
    assert (c.data.templates, c.eval.tasks, c.eval.train_tasks) == (("{title}",), ("emoji",), ())
    for data in ("emoji?where=vendor:noto", "pairs.tsv*1 + emoji*1"):
        assert config.load(spec, [f"data={data}"]).eval.tasks == ("emoji",)
    assert not own_data.is_embedded("emoji_of_mine.tsv") and own_data.is_embedded("x.tar*1 + scenes?objects=2*1")


def test_the_emoji_task_says_seen_only_of_a_model_that_has_seen_them():
    from clip_jax.evaluation import emoji

    metrics = {f"emoji/seen_concept_seen_vendor/{key}": 0.5 for key in ("top1", "top5", "chance_top1", "images")}
    metrics |= {f"emoji/seen_concept_seen_vendor/{key}": 1.0 for key in ("classes", "top1_without_compositions")}
    seen, other = ("\n".join(emoji.summary(metrics | {"emoji/trained_on_emoji": x})) for x in (1.0, 0.0))
    assert "were trained on" in seen and "were trained on" not in other and "does not name the emoji set" in other
    page = emoji.headline(metrics | {"emoji/trained_on_emoji": 0.0})
    assert "memorised" not in page and "does not name the emoji set" in page


# A whole run


def test_a_run_from_a_table_to_an_export(table, tmp_path, monkeypatch, capsys):
    from clip_jax import evaluate, train
    from clip_jax.tools import export, train_tokenizer

    monkeypatch.chdir(tmp_path)
    assert train_tokenizer.main([f"--source={table}", "--out=tokenizer"]) == 0
    arguments = ["--config=" + str(REPO / "configs" / "clip.py:small"), "--workdir=runs/mine"]
    tiny = ["model.embed_dim=16", "model.image.width=32", "model.image.heads=2", "model.image.mlp_dim=64"]
    tiny += ["model.image.depth=1", "model.text.width=32", "model.text.heads=2", "model.text.mlp_dim=64"]
    tiny += ["model.text.depth=1", "train.steps=4", "log.tensorboard=false", "tokenizer=tokenizer", f"data={table}"]
    assert train.main([*arguments, *(f"--config.{field}" for field in tiny)]) == 0
    printed = capsys.readouterr().out
    assert "images of 64 pixels" in printed and "held out of training: " in printed
    assert "<h3>Retrieval</h3>" in (tmp_path / "runs" / "mine" / "report.html").read_text()
    rows = [json.loads(row) for row in (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    held_out = len(make_source(f"{table}?holdout=0.1"))
    assert any(row.get("held_out/images") == held_out for row in rows)
    assert evaluate.main(["--checkpoint=runs/mine"]) == 0
    assert "held_out/image_to_text_R@1" in capsys.readouterr().out
    for target in ("open_clip", "hf"):
        assert export.main(["--checkpoint=runs/mine", f"--to={target}", f"--out=export/{target}"]) == 0
