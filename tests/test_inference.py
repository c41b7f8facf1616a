"""A checkpoint in use: clip_jax.load, embeddings, classification; and the command clip_jax.evaluate."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import REPO
from helpers import TINY, tiny_config

import clip_jax
from clip_jax import evaluate, search, train
from clip_jax.data.views import ImageView, TextView
from clip_jax.errors import UserError
from clip_jax.evaluation.classifier import make_classifier
from clip_jax.evaluation.prompts import class_prompts
from clip_jax.inference import Model
from clip_jax.tools import caption, export
from clip_jax.training import checkpoint


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    config = tiny_config("train.steps=4", "optim.ema_decay=0.5", "model.text.pool=mean")
    train.train(config, workdir, lambda line: None)
    return workdir


@pytest.fixture(scope="session")
def model(trained):
    return clip_jax.load(trained)


def pictures(n):
    rng = np.random.default_rng(0)
    return [PIL.Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(n)]


def test_embeddings_are_unit_rows_whatever_the_batch(model):
    images = pictures(5)
    z = model.embed_image(images)
    assert z.shape == (5, 16) and z.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        model.embed_image(images, batch_size=8),
        np.concatenate([model.embed_image(images[:2]), model.embed_image(images[2:])]),
        atol=1e-5,
    )
    texts = ["a cat", "", "a very long text " * 50, "문어"]
    t = model.embed_text(texts)
    np.testing.assert_allclose(np.linalg.norm(t, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.embed_text(texts[2:]), t[2:], atol=1e-5)
    assert model.embed_text([]).shape == (0, 16) and model.embed_image([]).shape == (0, 16)
    np.testing.assert_allclose(model.similarity(z, t), z @ t.T, atol=1e-5)


def test_image_features_are_what_the_projection_maps_to_the_embedding(model):
    images = np.stack([model.image_view({"image": image}, None) for image in pictures(3)])
    features = model.image_features(images)
    assert features.shape == (3, 32) and features.dtype == np.float32
    z = features @ np.asarray(model.params["img"]["proj"]["kernel"], np.float32)
    np.testing.assert_allclose(z / np.linalg.norm(z, axis=1, keepdims=True), model.embed_image(images), atol=1e-2)
    np.testing.assert_array_equal(model.image_features_share(images), features)
    without = Model(
        model.config, dataclasses.replace(model.method, image_features=None), model.params, {}, None, model.mesh
    )
    with pytest.raises(UserError, match="method='clip' has no image_features; features='embedding' needs none"):
        without.image_features(images)


def test_pictures_may_be_pil_arrays_or_bytes(model, tmp_path):
    image = pictures(1)[0]
    image.save(tmp_path / "x.png")
    z = model.embed_image([image, np.asarray(image), (tmp_path / "x.png").read_bytes()])
    np.testing.assert_allclose(z[1:], z[[0, 0]], atol=1e-6)


def test_one_text_and_one_image_are_lists_of_one(model, tmp_path):
    image = pictures(1)[0]
    image.save(tmp_path / "x.png")
    z = model.embed_image([image])
    for one in (image, np.asarray(image), np.asarray(image)[None], (tmp_path / "x.png").read_bytes()):
        np.testing.assert_allclose(model.embed_image(one), z, atol=1e-6)
    grey = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(model.embed_image(grey), model.embed_image([grey]))
    np.testing.assert_array_equal(model.embed_text("a cat"), model.embed_text(["a cat"]))
    np.testing.assert_array_equal(model.embed_text(("a cat",)), model.embed_text(np.array(["a cat"])))
    np.testing.assert_array_equal(model.classify(image, "cat"), [[1.0]])
    assert make_classifier(model, "cat").classes == 1
    assert class_prompts("cat", "a {}") == ["a cat"]
    assert ImageView(augment="squash") == ImageView(augment=("squash",))
    assert TextView(templates="{name}") == TextView(templates=["{name}"])
    (query,) = search.make_queries(model, "a cat", (), "red")
    assert query.label == "a cat + red"


@pytest.mark.parametrize("texts", [None, 3, b"a cat", {"a cat": 1}, {"a cat"}, ["a cat", None], [b"a cat"], [["a"]]])
def test_other_texts_are_a_type_error(model, texts):
    with pytest.raises(TypeError, match="texts: .*strings?"):
        model.embed_text(texts)
    error, message = (TypeError, "class_names: .*strings?") if texts is not None else (UserError, "give class names")
    with pytest.raises(error, match=message):
        model.classify(pictures(1), texts)


@pytest.mark.parametrize(
    "images",
    [
        None,
        "x.png",
        ["x.png"],
        [None],
        np.zeros((4, 5, 3), np.float32),
        np.zeros((2, 4, 5), np.uint8),
        np.zeros(9, np.uint8),
        {"image": 1},
    ],
)
def test_other_images_are_a_type_error(model, images):
    with pytest.raises(TypeError, match="images: "):
        model.embed_image(images)


def test_classify_gives_probabilities(model):
    images = pictures(3)
    p = model.classify(images, ["cat", "dog", "house"], templates=("a {}", "the {}"))
    assert p.shape == (3, 3)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    mean = sum(model.embed_text([t.format(c) for c in ("cat", "dog", "house")]) for t in ("a {}", "the {}"))
    scores = model.embed_image(images) @ (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T
    assert (p.argmax(1) == scores.argmax(1)).all()


def test_a_copied_step_folder_is_enough(trained, model, tmp_path):
    shutil.copytree(trained / "checkpoints" / "4", tmp_path / "elsewhere")
    other = clip_jax.load(tmp_path / "elsewhere")
    np.testing.assert_array_equal(other.embed_text(["a cat"]), model.embed_text(["a cat"]))
    assert other.tokenizer.fingerprint() == model.tokenizer.fingerprint()


def test_steps_and_the_moving_average(trained, model):
    text = ["a cat"]
    assert not np.allclose(clip_jax.load(trained, 2).embed_text(text), model.embed_text(text))
    assert not np.allclose(clip_jax.load(trained, ema=True).embed_text(text), model.embed_text(text))


@pytest.mark.parametrize(
    "which, message", [("3", "no checkpoint of step 3"), ("best", "no checkpoint in .* has the metric that decides")]
)
def test_checkpoints_that_are_not_there(trained, which, message):
    with pytest.raises(UserError, match=message):
        clip_jax.load(trained, which)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        clip_jax.load(tmp_path / "none")
    with pytest.raises(UserError, match="there is no checkpoint in"):
        clip_jax.load(tmp_path)


@pytest.mark.parametrize("choice", [dict(which="best"), dict(which=3), dict(ema=True)])
def test_third_party_weights_have_no_steps_to_choose(tmp_path, choice):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="only one state of its weights: leave out which and ema"):
        clip_jax.load(tmp_path, **choice)
    with pytest.raises(UserError, match="model.safetensors"):
        clip_jax.load(tmp_path, which="latest", ema=False)


@pytest.mark.parametrize("program", ["evaluate", "search", "export", "caption", "train"])
def test_damaged_arrays_end_every_command_with_one_line(trained, tmp_path, program, capfd):
    shutil.copytree(trained, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "4" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 10])
    run, config = f"{tmp_path}/run", REPO / "configs" / "clip.py:emoji"
    flags = [f"--config.{override}" for override in (*TINY, "model.text.pool=mean", f"init_from={run}")]
    main, arguments = {
        "evaluate": (evaluate.main, [f"--checkpoint={run}", "--task=emoji"]),
        "search": (search.main, [f"--checkpoint={run}", "--images=emoji", "--text=red"]),
        "export": (export.main, [f"--checkpoint={run}", "--to=open_clip", f"--out={tmp_path}/out"]),
        "caption": (caption.main, ["--source=emoji", f"--captioner=retrieval:{run}", f"--out={tmp_path}/out.jsonl"]),
        "train": (train.main, [f"--config={config}", f"--workdir={tmp_path}/new", *flags]),
    }[program]
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "the checkpoint" in line and "/4' is damaged: " in line and len(line) < 500


@pytest.mark.parametrize("damage", ["manifest", "data"])
def test_a_damaged_list_of_arrays_is_one_line(trained, tmp_path, damage, capfd):
    shutil.copytree(trained, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "4" / "state"
    (state / "manifest.ocdbt").write_bytes(b"x") if damage == "manifest" else shutil.rmtree(state / "d")
    with pytest.raises(UserError, match="/4' is damaged: "):
        clip_jax.load(tmp_path / "run")
    assert capfd.readouterr().err == ""


def test_the_best_checkpoint_has_a_number(trained, tmp_path):
    for step, values in {2: {"loss": math.nan}, 4: {"loss": 3.0}}.items():
        target = shutil.copytree(trained / "checkpoints" / str(step), tmp_path / "checkpoints" / str(step))
        meta = json.loads((target / "meta" / "metadata").read_text())
        meta["config"]["checkpoint"]["best"], meta["metrics"] = "-loss", values
        (target / "meta" / "metadata").write_text(json.dumps(meta))
    assert checkpoint.find(tmp_path, "best").name == "4"


def test_weights_that_diverged_are_no_accuracy(model):
    """Every score would be NaN, and the first class the most similar one of each image."""
    towers = {"img": model.embed_image, "txt": model.embed_text}
    for tower, inputs in (("img", pictures(2)), ("txt", ["a", "b"])):
        params = {**model.params, tower: jax.tree.map(lambda x: x * np.nan, model.params[tower])}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="2 of 2 embeddings are not finite"):
            patch.setattr(model, "params", params)
            towers[tower](inputs)
    assert all(
        np.isfinite(embed(inputs)).all() for embed, inputs in zip(towers.values(), (pictures(2), ["a"]), strict=True)
    )


def test_overrides_that_change_shapes_are_not_called_damage(trained):
    with pytest.raises(UserError, match="does not fit the configuration: .*stored shape"):
        clip_jax.load(trained, overrides=["model.embed_dim=8"])


def test_a_damaged_meta_item_is_one_line(trained, tmp_path):
    for number, content in enumerate(("", "{", "[]", "{}", '{"config": {}, "tokenizer": 1}')):
        shutil.copytree(trained / "checkpoints" / "4", tmp_path / str(number))
        (tmp_path / str(number) / "meta" / "metadata").write_text(content)
        with pytest.raises(UserError, match=f"/{number}' is damaged: "):
            clip_jax.load(tmp_path / str(number))


def class_folder(path, n=6):
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        for i, image in enumerate(pictures(n)):
            image.save(path / name / f"{i}.png")
    return path


def test_evaluate_command_on_a_folder(trained, tmp_path, capsys):
    data = class_folder(tmp_path / "data")
    task = f"zeroshot(source='{data}', templates='clip_7', name='pets')"
    probe = f"probe(train='{data}', test='{class_folder(tmp_path / 'more')}', test_split='train')"  # equal data
    code = evaluate.main(
        [
            f"--checkpoint={trained}",
            f"--task={task}",
            f"--task={probe}",
            f"--json={tmp_path}/m.json",
            f"--report={tmp_path}/r.html",
        ]
    )
    out = capsys.readouterr()
    assert code == 0, out.err
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert (
        metrics["pets/images"] == 12
        and metrics["pets/classes"] == 2
        and 0 <= metrics["pets/top1"] <= 1
        and "probe/accuracy" in metrics
    )
    assert "pets/top1" in out.out and (tmp_path / "r.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_retrieval_task_counts_every_caption(trained, tmp_path):
    for i, image in enumerate(pictures(4)):
        image.save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "caption": [f"number {i}", f"picture {i}"]} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = evaluate.run(clip_jax.load(trained), [f"retrieval(source='{tmp_path}/data.jsonl')"], lambda line: None)
    assert result.metrics["retrieval/images"] == 4 and result.metrics["retrieval/texts"] == 8
    assert result.metrics["retrieval/image_to_text_R@10"] == 1.0


@pytest.mark.parametrize(
    "task, message",
    [
        ("zeroshoot(source='x')", "did you mean 'zeroshot'"),
        ("zeroshot(sorce='x')", "it is zeroshot"),
        ("zeroshot(source=x)", "cannot read"),
        ("emoji(subset='train')", "subset='train'"),
    ],
)
def test_wrong_tasks(trained, task, message, capsys):
    assert evaluate.main([f"--checkpoint={trained}", f"--task={task}"]) == 2
    assert message in capsys.readouterr().err


def test_class_lists_with_duplicates_are_refused(trained, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("cat\ncat\n")
    data = class_folder(tmp_path / "data")
    assert (
        evaluate.main(
            [f"--checkpoint={trained}", f"--task=zeroshot(source='{data}', classes='{tmp_path}/classes.txt')"]
        )
        == 2
    )
    assert "cat" in capsys.readouterr().err
