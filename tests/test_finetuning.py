"""Fine-tuning: the model follows from the weights, classification of labels, interpolation of weights."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, golden_files
from helpers import TINY, run, tiny_config, unit
from model_helpers import BATCH, initialise, run_steps
from PIL import Image
from test_init_from import CLASSIC, flat

import clip_jax
from clip_jax import config as config_lib
from clip_jax import from_weights, init_from, train
from clip_jax.errors import UserError
from clip_jax.evaluation import accuracy
from clip_jax.interop.export import export
from clip_jax.methods.classify import Options
from clip_jax.methods.interface import init_shapes, make_method
from clip_jax.tools import interpolate

CLIP, CLASSIFY = (str(REPO / "configs" / name) for name in ("clip.py:finetune", "classify.py"))
SIGLIP = str(REPO / "configs" / "siglip.py:finetune")
NAMES = ("cat", "dog", "big bear")
#: Overrides of a run of two steps.
SHORT = [o for o in TINY if not o.startswith(("model.", "train.steps", "data.batch_size", "optim.name", "optim.lr"))]
SHORT += ["data.batch_size=8", "train.steps=2", "model.dtype=float32"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An open_clip folder of a tiny model of 16 pixels, and the folder of labelled images of three classes."""
    root = tmp_path_factory.mktemp("weights")
    c, _, tokenizer, method = train.make_parts(tiny_config("model.logit_scale_init=2.0", *CLASSIC))
    params, extra = initialise(method.init, BATCH, seed=7)
    export(clip_jax.Model(c, method, params, extra, tokenizer), "open_clip", root / "model")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for number, name in enumerate(NAMES):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (20, 24, 3), np.uint8) + np.uint8(50 * number)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    rows = [f"data/train/{name}/{i}.png\ta {name} number {i}" for name in NAMES for i in range(8)]
    (root / "pairs.tsv").write_text("\n".join(["image\tcaption", *rows]))
    return root


def tuned(weights, *overrides, spec=CLIP, source="pairs.tsv"):
    given = [f"init_from={weights / 'model'}", f"data.source={weights / source}"]
    return from_weights.load(spec, [*SHORT, *given, *overrides])


# The model follows from the weights


def test_the_model_follows_from_the_weights(weights):
    c = tuned(weights, "data=" + str(weights / "pairs.tsv"))
    image, text = c.model.image, c.model.text
    assert (image.size, image.patch, image.width, image.act, text.width, text.vocab_size) == (
        16, 8, 32, "gelu", 32, 49408,
    )  # fmt: skip
    assert (c.method, c.tokenizer, c.model.embed_dim, text.context) == ("clip", "clip_bpe", 16, 12)
    assert c.eval.transform[1:] == ("center_crop", "drop_alpha") and c.data.augment == ("drop_alpha", "rrc(0.9, 1.0)")
    assert (c.optim.lr, c.optim.weight_decay, c.model.dtype) == (1e-5, 0.1, "float32")
    assert not c.init_from_model and not c.init_from_resize
    assert from_weights.take(c, ["model.image.size=32"]) is c


def test_what_is_set_on_purpose_wins(weights):
    c = tuned(
        weights, "model.image.size=32", "model.text.context=20", "data.augment=squash", "model.logit_scale_max=9.0"
    )
    assert (c.model.image.size, c.model.text.context, c.model.logit_scale_max) == (32, 20, 9.0)
    assert c.data.augment == ("squash",) and c.init_from_resize
    c = tuned(weights, "model.image={'size': 32}", "model.text.act=quick_gelu", "init_from_allow=model.text.act")
    assert (c.model.image.size, c.model.image.act, c.model.text.act) == (32, "gelu", "quick_gelu")


def test_everything_that_contradicts_the_weights_is_in_one_message(weights):
    wrong = [
        "model.image.width=64",
        "model.text.act=gelu_tanh",
        "model.image_mean=(0.5, 0.5, 0.5)",
        "tokenizer=sentencepiece",
    ]
    with pytest.raises(UserError) as error:
        tuned(weights, *wrong, "method=siglip")
    message = str(error.value)
    assert "model.image.width: 32 there, 64 here; " in message and "model.text.act: 'gelu' there, " in message
    assert "model.image_mean: (0.48" in message and "tokenizer: 49408 ids there, " in message
    assert "method='clip' there, 'siglip' here, whose logit_bias they lack" in message and "\n" not in message


def test_no_device_is_touched_before(weights, tmp_path):
    command = ["-m", "clip_jax.train", f"--config={CLIP}", f"--workdir={tmp_path / 'run'}"]
    options = [f"--config.init_from={weights / 'model'}", f"--config.data={weights / 'pairs.tsv'}"]
    options += ["--config.init_from_params=^img/,^nothing/"]
    found = run([sys.executable, *command, *options], env={"JAX_PLATFORMS": "no_such_platform"})
    assert found.returncode == 2 and found.stderr.startswith("error: init_from_params: '^nothing/' matches no")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], "fine-tuning: give the weights and the data: --config.init_from=PATH --config.data=PATH"),
        (["init_from=/nowhere"], "fine-tuning: give the data: --config.data=PATH"),
        (["init_from=/nowhere", "data.source=emoji"], "init_from: there is no checkpoint: '/nowhere' is no folder"),
        (["init_from=img=a, txt=b", "data.source=emoji"], "one source with both towers"),
    ],
)
def test_what_is_missing_is_named(overrides, message):
    with pytest.raises(UserError, match=message):
        from_weights.load(CLIP, overrides)


def test_siglip_follows_from_its_weights(weights, tmp_path):
    towers = """image.pool=map image.patch_bias=true image.proj=false image.ln_eps=1e-6 embed_dim=32 text.pool=last
        text.mask_padding=false text.proj_bias=true text.ln_eps=1e-6""".split()
    given = [
        "method=siglip",
        "tokenizer=sentencepiece?pad_with_eot=true",
        "eval.transform=squash(interpolation='bicubic')",
    ]
    c, _, tokenizer, method = train.make_parts(tiny_config(*given, *(f"model.{field}" for field in towers)))
    params, extra = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), init_shapes(c))
    export(clip_jax.Model(c, method, params, extra, tokenizer), "hf", tmp_path / "model")
    found = from_weights.load(CLIP, [f"init_from={tmp_path / 'model'}", "data.source=emoji"])
    assert (found.method, found.model.image.pool, found.model.text.causal) == ("siglip", "map", False)
    assert found.tokenizer.startswith("siglip:") and found.data.augment == found.eval.transform == c.eval.transform
    with pytest.raises(UserError, match="method='clip' there, 'siglip' here, whose logit_bias"):
        tuned(weights, spec=SIGLIP)


@pytest.mark.parametrize("folder", golden_files("hf_siglip"))
def test_a_tokenizer_that_is_not_beside_the_weights_is_asked_for(folder):
    given = [f"init_from={folder}", "data.source=emoji", "tokenizer=sentencepiece?pad_with_eot=true"]
    with pytest.raises(UserError, match="tokenizer: .* ids there"):
        from_weights.load(CLIP, given)
    with pytest.raises(UserError, match="their tokenizer is not found: give it"):
        from_weights.load(CLIP, given[:2])


def test_a_tokenizer_that_is_given_is_not_looked_for(weights, tmp_path):
    for file in (weights / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")  # no tokenizer that is known here
    given = [f"init_from={tmp_path}", "data.source=emoji"]
    with pytest.raises(UserError, match="not a Hugging Face tokenizer"):
        from_weights.load(CLIP, given)
    spec = "clip_bpe?specials=openai"
    assert from_weights.load(CLIP, [*given, f"tokenizer={spec}"]).tokenizer == spec


def test_a_run_takes_two_steps_and_is_a_source_itself(weights, tmp_path):
    c = tuned(weights, "model.image.size=32", "optim.warmup_steps=0")
    lines = []
    train.train(c, tmp_path / "run", lines.append)
    assert any("position embeddings resized" in line for line in lines)
    assert clip_jax.load(tmp_path / "run").params["img"]["pos"].shape == (1, 17, 32)
    again = from_weights.load(CLIP, [f"init_from={tmp_path / 'run'}", "data.source=emoji"])
    assert again.model.image == c.model.image and again.tokenizer == "clip_bpe" and again.model.text.context == 12
    assert again.eval.transform == c.eval.transform


# Classification


def classes(weights, *overrides):
    task = f"accuracy(source={str(weights / 'data')!r})"
    return tuned(
        weights, f"eval.tasks=[{task!r}]", "classify.templates=simple", *overrides, spec=CLASSIFY, source="data"
    )


@pytest.fixture(scope="module")
def classified(weights):
    """The work folder of two steps on labels, and the metrics of its evaluation."""
    c = classes(weights, "optim.warmup_steps=0", "optim.lr=1e-3")
    return weights / "classified", train.train(c, weights / "classified", lambda line: None)


def test_the_first_head_is_the_zero_shot_classifier(weights, tmp_path):
    c, source, tokenizer, method = train.make_parts(classes(weights))
    assert c.classify.classes == ("big bear", "cat", "dog") and c.optim.freeze == ("^txt/", "^logit_")
    assert c.optim.warmup_steps == 0 and c.train.steps == 2
    init_from.check(c, tokenizer, tmp_path)
    mesh = train_mesh()
    params, extra = init_from.beginning(c, method, tokenizer, mesh)
    theirs = clip_jax.load(weights / "model")
    images = BATCH["image"][:5]
    z, columns = np.asarray(theirs.embed_image(images), np.float64), []
    for name in c.classify.classes:  # section 2 of the paper, by class and template
        prompts = [f"a photo of a {name}.", f"a photo of {name}."]
        mean = np.asarray(theirs.embed_text(prompts[:1]), np.float64).mean(0)
        columns.append(mean / np.linalg.norm(mean))
    expected = np.exp(2.0) * z @ np.stack(columns, 1)
    np.testing.assert_allclose(method.class_logits(params, jnp.asarray(z, jnp.float32)), expected, rtol=1e-4, atol=1e-4)
    ours = clip_jax.Model(c, method, params, extra, tokenizer, mesh)
    found = ours.classify(images)
    np.testing.assert_allclose(found, theirs.classify(images, c.classify.classes, "simple"), rtol=1e-4)
    with pytest.raises(UserError, match="was not trained on classes"):
        theirs.classify(images)


def train_mesh():
    from clip_jax.runtime import sharding

    return sharding.make_mesh(config_lib.base().mesh)


def classifier(**options):
    c = config_lib.resolve(tiny_config(), train.make_parts(tiny_config())[2]).copy_and_resolve_references()
    return config_lib.set_method(c, "classify", Options(classes=NAMES, **options))


def test_the_loss_is_smoothed_cross_entropy_of_known_labels():
    method = make_method(classifier(label_smoothing=0.1))
    z, kernel, label = unit(0, 6, 16), unit(1, 16, 3) * 4, np.array([0, 2, -1, 1, 1, -1])
    params = {"head": {"kernel": kernel, "bias": jnp.asarray([0.5, 0.0, -0.5])}}
    value, metrics = method.loss(params, {}, {"image": z}, {"label": jnp.asarray(label)}, None)
    logits = np.asarray(z, np.float64) @ np.asarray(kernel, np.float64) + [0.5, 0.0, -0.5]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    known = label >= 0
    expected = -0.9 * log_p[known, label[known]] - 0.1 * log_p[known].mean(1)  # LabelSmoothing of the authors
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
    assert metrics["class_acc"] == pytest.approx((logits.argmax(1) == label)[known].mean())


def test_micro_batches_and_meshes_give_the_same_steps():
    c = classifier()
    batch = {name: x for name, x in BATCH.items() if name != "text"}
    batch["label"] = np.resize(np.array([0, 1, 2, -1, 2], np.int32), 16)
    expected, _ = run_steps(c, make_method(c), None, steps=3, devices=jax.devices()[:1], batch=batch)
    assert expected[0]["loss"] == pytest.approx(np.log(3)) and expected[2]["loss"] < expected[0]["loss"]
    c.micro_batches = 2
    found, _ = run_steps(c, make_method(c), dict(data=2, fsdp=2, tensor=2), steps=3, batch=batch)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-4)


def test_a_run_on_labels(weights, classified, tmp_path):
    workdir, metrics = classified
    assert metrics["accuracy/images"] == 9 and metrics["accuracy/classes"] == 3
    model, before = clip_jax.load(workdir), flat(clip_jax.load(weights / "model").params)
    after = flat(model.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved and all(path.startswith("img/") for path in moved) and model.class_names[0] == "big bear"
    p = model.classify([Image.open(path) for path in sorted((weights / "data" / "test").glob("*/*.png"))])
    assert (p.argmax(1) == np.repeat(range(3), 3)).mean() == pytest.approx(metrics["accuracy/top1"])
    lines = export(model, "open_clip", tmp_path / "exported")
    assert "note: the classifier of 3 classes is left out" in lines
    assert flat(clip_jax.load(tmp_path / "exported").params).keys() == before.keys()
    # A part of the classes is evaluated among that part; other classes are refused.
    (tmp_path / "part").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "part" / name).symlink_to(weights / "data" / "test" / name)
    assert accuracy.run(model, str(tmp_path / "part")).metrics["accuracy/classes"] == 2
    with pytest.raises(UserError, match="the model was trained on 3 classes .* not on 'bird'"):
        accuracy.run(model, str(tmp_path / "part"), classes={"cat": "cat", "dog": "bird"})


def test_classes_are_needed(weights):
    with pytest.raises(UserError, match="method='classify' needs one label of each image: .* has no names of classes"):
        train.make_parts(tuned(weights, spec=CLASSIFY))


# Interpolation


def test_weights_between_two_checkpoints(weights, classified, tmp_path, capsys):
    workdir, metrics = classified
    assert interpolate.main([f"--b={workdir}", "--alpha=0,1", f"--json={tmp_path / 'found.json'}"]) == 0
    found, out = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    assert found["1.0"] == pytest.approx(metrics) and out.split()[0] == "alpha"
    assert interpolate.main([f"--b={workdir}", "--alpha=0.25", f"--out={tmp_path / 'mixed'}"]) == 0
    mixed, b = flat(clip_jax.load(tmp_path / "mixed").params), flat(clip_jax.load(workdir).params)
    a = flat(clip_jax.load(weights / "model").params)
    for path in ("img/patch/kernel", "img/block_0/mlp/fc1/kernel", "txt/embed/embedding"):
        np.testing.assert_allclose(mixed[path], 0.75 * a[path] + 0.25 * b[path], rtol=1e-5, atol=1e-7)
    assert mixed.keys() == b.keys() and not np.array_equal(mixed["img/patch/kernel"], a["img/patch/kernel"])
    capsys.readouterr()
    for arguments, message in [
        (["--alpha=0.5,2"], "--alpha=0.5,2: give numbers from 0 to 1"),
        (["--alpha=0,1", "--out=x"], "--out takes one alpha"),
        ([f"--out={tmp_path / 'mixed'}"], "this folder already has checkpoints"),
        ([f"--a={weights / 'model'}"], "cannot be mixed: head/bias is missing and (3); head/kernel"),
    ]:
        assert interpolate.main([f"--b={workdir}", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"this run did not start from weights \(init_from\): give --a"):
        interpolate.beginning(clip_jax.load(workdir, overrides=["init_from="]), workdir)


def test_weights_of_a_run_that_has_trained_on_are_not_the_beginning(tmp_path):
    for name, log, rows in (
        ("a", "metrics.jsonl", [{"step": 90, "time": 10}, {"step": 100, "time": 20}, {"step": 100, "time": 99}]),
        ("b", "config_history.jsonl", [{"step": 0, "time": 30}, {"step": 5, "time": 200}]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / log).write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for given in (a, f"img={a}, txt={tmp_path}/weights.npz", f"{a}/checkpoints"):
        (line,) = interpolate._steps(given, b)
        assert line.endswith(", trained to step 100")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 120, "time": 100}\n')
    for step, is_whole in ((60, True), (100, True), (120, True), (90, False)):
        (tmp_path / "a" / "checkpoints" / str(step)).mkdir(parents=True)
        if is_whole:
            (tmp_path / "a" / "checkpoints" / str(step) / "commit_success.txt").touch()
    message = f"{a}, which .*b.* started from, has trained on since, from step 100 to 120: .* --a={a}/checkpoints/100"
    for given in (a, f"txt={tmp_path}/weights.npz, img={a}"):
        with pytest.raises(UserError, match=message):
            list(interpolate._steps(given, f"{b}/checkpoints/5"))
    assert not list(interpolate._steps(f"{a}/checkpoints/100", b))
    for step, hint in ((100, f", such as --a={a}/checkpoints/60$"), (60, "started from with --a$")):
        (tmp_path / "a" / "checkpoints" / str(step) / "commit_success.txt").unlink()
        with pytest.raises(UserError, match=hint):
            list(interpolate._steps(a, b))
    (tmp_path / "a,c").symlink_to(a)
    with pytest.raises(UserError, match="a,c, which .* has trained on since, from step 100 to 120"):
        list(interpolate._steps(f"{tmp_path}/a,c", b))
    (tmp_path / "b" / "config_history.jsonl").unlink()
    assert not list(interpolate._steps(a, b))


def test_held_out_records_evaluate_the_head(weights):
    c, source, _, _ = train.make_parts(classes(weights, "eval.tasks=()", "data.holdout=0.3"))
    assert len(source) < 24 and [task.partition("(")[0] for task in c.eval.tasks] == ["accuracy"]
