"""Export: written weights are read back bit for bit as the same model; inexpressible models get one-line errors."""

import json
import sys
import types

import jax
import numpy as np
import pytest
import tokenizers as library
from flax import traverse_util

import clip_jax
from clip_jax import config as config_lib
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.base import VOCAB_FOLDER
from clip_jax.errors import UserError
from clip_jax.inference import Model
from clip_jax.interop import export, export_tokenizer, load
from clip_jax.interop.tokenizer import find as find_tokenizer
from clip_jax.methods.interface import make_method
from clip_jax.tools import clip_benchmark
from clip_jax.tools import export as export_command
from clip_jax.training import checkpoint

TRANSFORMER = dict(width=32, depth=2, heads=2, mlp_dim=64)
VIT = dict(TRANSFORMER, kind="vit", size=16, patch=8)
TEXT = dict(TRANSFORMER, kind="transformer", context=10)
MAP = dict(VIT, pool="map", cls_token=False, ln_pre=False, patch_bias=True, proj=False, act="gelu_tanh", ln_eps=1e-6)
LAST = dict(TEXT, pool="last", causal=False, proj_bias=True, act="gelu_tanh", ln_eps=1e-6)
RESNET = dict(kind="resnet", size=32, layers=(1, 2, 1, 1), width=16)
STAGES = ((8, 1, 3, 1, 1), (16, 2, 5, 2, 4))
EFFICIENT = dict(kind="efficientnet", size=32, stages=STAGES, padding="even", proj=False)
BERT = dict(TRANSFORMER, kind="bert", context=10, positions=10, pad_id=0, dropout=0.1, attention_dropout=0.1)
SIGLIP_TOKENIZER = "sentencepiece?lower=true&pad_with_eot=true"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "##s", ",", "!", "pizza"]
TEXTS = [
    "a photo of a cat",
    "Cats, PIZZA!  and <b>more</b>",
    "",
    "ein großer Hund läuft 123 m — schnell",
    "猫の写真 🐈",
    "a_b" * 30,
]


def make_model(method="clip", image=None, text=None, tokenizer="clip_bpe", seed=0, **model):
    """A small model with random parameters and running statistics."""
    c = config_lib.base().unlock()
    c.method, c.tokenizer = method, tokenizer
    c.model.dtype, c.model.embed_dim = "float32", 32
    c.model.update(model)
    for which, fields in (("image", image or VIT), ("text", text or TEXT)):
        if fields["kind"] in ("vit", "transformer"):
            c.model[which].update(fields)
        else:
            c.model[which] = dict(fields, vocab_size=0, eot_id=-1) if which == "text" else fields
    tokenizer = make_tokenizer(tokenizer)
    c = config_lib.resolve(c, tokenizer)
    method = make_method(c)
    batch = method.batch_spec(2)
    rng = np.random.default_rng(seed)
    tree = jax.eval_shape(method.init, jax.random.key(0), batch)
    params, extra = jax.tree.map(lambda x: rng.uniform(0.05, 0.3, x.shape).astype(np.float32), tree)
    return Model(c, method, params, extra, tokenizer)


def flat(model):
    tree = traverse_util.flatten_dict({"params": model.params, "extra": model.extra}, sep="/")
    return {path: np.asarray(x) for path, x in tree.items()}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(PIECES))
    return path


CASES = {
    "quick_gelu": ("open_clip", dict()),
    "gelu": (
        "open_clip",
        dict(image=dict(VIT, act="gelu", ln_pre=False), text=dict(TEXT, act="gelu", mask_padding=True)),
    ),
    "gelu_tanh": (
        "open_clip",
        dict(image=dict(VIT, act="gelu_tanh", pool="gap"), text=dict(TEXT, act="gelu_tanh", mlp_dim=100)),
    ),
    "sigmoid": ("open_clip", dict(method="siglip", text=dict(TEXT, pool="first", causal=False, proj_bias=True))),
    "resnet": ("open_clip", dict(image=RESNET)),
    "clip": ("hf", dict(image=dict(VIT, act="gelu"))),
    "siglip": ("hf", dict(method="siglip", image=MAP, text=LAST, tokenizer=SIGLIP_TOKENIZER)),
    "align": ("hf", dict(method="align", image=EFFICIENT, text=BERT, tokenizer="wordpiece:{vocabulary}", embed_dim=16)),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trips_are_exact(name, vocabulary, tmp_path):
    to, fields = CASES[name]
    if "tokenizer" in fields:
        fields = fields | {"tokenizer": fields["tokenizer"].format(vocabulary=vocabulary)}
    model = make_model(**fields)
    lines = export.export(model, to, tmp_path / "out")
    assert lines[0].startswith("written: ") and len(lines) == 1 + (to == "open_clip")
    again = load.load(tmp_path / "out")
    expected, found = flat(model), flat(Model(model.config, model.method, again.params, again.extra, None))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    assert again.config.method == model.config.method
    load.shapes(model.config.unlock())  # fills in all fields of the towers
    names = [
        "model.embed_dim",
        "model.image_mean",
        "model.image_std",
        "model.image.act",
        "model.text.act",
        "model.image.heads",
    ]
    assert config_lib.differences(model.config, again.config, names) == []


def test_a_checkpoint_with_stacked_layers_through_the_command(tmp_path, capsys):
    model, scanned = make_model(), make_model(scan=True)
    with checkpoint.Checkpointer(tmp_path / "run", scanned.config, scanned.tokenizer) as checkpointer:
        checkpointer.save(3, {"params": scanned.params, "extra": scanned.extra}, {})
        checkpointer.wait()
    arguments = [f"--checkpoint={tmp_path / 'run'}", "--to=open_clip", f"--out={tmp_path / 'out'}"]
    assert export_command.main(arguments) == 0
    count = sum(x.size for x in jax.tree.leaves(model.params))
    files = "open_clip_config.json, open_clip_model.safetensors"
    first, note = capsys.readouterr().out.splitlines()
    assert first == f"written: {tmp_path / 'out'}: {count:,} parameters; {files}"
    assert note == "note: transparent pictures: here they are put on white; in the target their colours show"
    theirs, ours = clip_jax.load(tmp_path / "out"), clip_jax.load(tmp_path / "run")
    np.testing.assert_array_equal(
        theirs.params["img"]["block_1"]["mlp"]["fc1"]["kernel"], ours.params["img"]["block"]["mlp"]["fc1"]["kernel"][1]
    )
    np.testing.assert_allclose(theirs.embed_text(TEXTS), ours.embed_text(TEXTS), atol=1e-5)
    assert (
        export_command.main(arguments) == 2
        and "already exists and is not an empty folder: give a new folder" in capsys.readouterr().err
    )


def test_the_configuration_for_open_clip(tmp_path):
    model = make_model(image=dict(VIT, act="gelu_tanh"), text=dict(TEXT, act="gelu_tanh"))
    model.config.unlock().eval.transform = ("squash(interpolation='bilinear')",)
    export.export(model, "open_clip", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    preprocess = content["preprocess_cfg"]
    assert (
        preprocess["resize_mode"] == "squash" and preprocess["interpolation"] == "bilinear" and preprocess["size"] == 16
    )
    assert preprocess["mean"] == list(model.config.model.image_mean)
    model_cfg = content["model_cfg"]
    assert model_cfg["quick_gelu"] is False and model_cfg["text_cfg"]["act_kwargs"] == {"approximate": "tanh"}
    assert model_cfg["vision_cfg"]["head_width"] == 16 and model_cfg["text_cfg"]["pool_type"] == "argmax"
    assert "hf_tokenizer_name" not in model_cfg["text_cfg"], "CLIP's vocabulary is built into open_clip"


@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_inexact_preprocessing_is_noted(to, tmp_path):
    model = make_model()
    model.config.unlock().eval.transform = ("squash(interpolation='bilinear', antialias=False)",)
    lines = export.export(model, to, tmp_path / "a", tokenizer=False)
    assert "; the nearest is written: both sides to 16 pixels, bilinear, antialiased" in lines[1]
    assert lines[-1] == "note: no tokenizer is written" and not (tmp_path / "a" / "vocab.json").exists()
    model.config.eval.transform = ("resize(20)", "center_crop")
    notes = export.export(model, to, tmp_path / "b")[1:]
    if to == "open_clip":
        assert len(notes) == 2, "open_clip resizes to the size of the model only"
        assert notes[1] == ("note: transparent pictures: here they are put on white; in the target their colours show")
    else:
        assert not notes


@pytest.mark.parametrize(
    "to, fields, message",
    [
        ("open_clip", dict(image=dict(VIT, stem=(8, 16, 32))), r"cannot express model.image.stem=\(8, 16, 32\)"),
        (
            "open_clip",
            dict(image=dict(VIT, pool="mean_all")),
            "cannot express model.image.pool='mean_all': only 'cls' is possible",
        ),
        ("open_clip", dict(text=dict(TEXT, pool="mean")), "cannot express model.text.pool='mean'"),
        (
            "open_clip",
            dict(image=dict(VIT, act="gelu"), text=dict(TEXT, act="quick_gelu")),
            "cannot express model.image.act='gelu'",
        ),
        ("open_clip", dict(image=dict(VIT, patch_bias=True)), "cannot express model.image.patch_bias=True"),
        ("open_clip", dict(image=dict(VIT, posemb="sincos2d")), "cannot express model.image.posemb='sincos2d'"),
        (
            "open_clip",
            dict(method="siglip", image=MAP, text=LAST),
            "timm, .* has none of this patch, width, depth and size",
        ),
        (
            "open_clip",
            dict(method="align", image=EFFICIENT, embed_dim=16),
            "model.image.kind='efficientnet': its image tower must be",
        ),
        ("hf", dict(image=RESNET), "model.image.kind='resnet': its image tower must be vit"),
        (
            "hf",
            dict(image=dict(VIT, pool="gap")),
            "cannot express model.image.pool='gap': only 'cls' is possible",
        ),
        ("hf", dict(image=dict(VIT, ln_pre=False)), "cannot express model.image.ln_pre=False"),
        ("hf", dict(text=dict(TEXT, causal=False)), "cannot express model.text.causal=False"),
        ("hf", dict(method="siglip"), "cannot express model.image.cls_token=True: only False is possible"),
        ("flax", dict(), "unknown target 'flax'"),
    ],
)
def test_what_a_target_cannot_express_is_refused(to, fields, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        export.export(make_model(**fields), to, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_models_without_text_tokens_are_refused(tmp_path):
    c = config_lib.load("configs/clippo.py", ["model.image.depth=1"])
    model = Model(c, make_method(c), {"img": {}}, {}, make_tokenizer("unifont"))
    for to in export.TARGETS:
        with pytest.raises(UserError, match="cannot express method='clippo': its texts must be token ids, not images"):
            export.export(model, to, tmp_path / "out")


def written(tokenizer, context=77):
    """Returns `(tokenizers.Tokenizer, configuration)` of the files for transformers."""
    files = export_tokenizer.for_hf(tokenizer, context)
    return library.Tokenizer.from_str(json.dumps(files["tokenizer.json"])), files["tokenizer_config.json"]


@pytest.mark.parametrize(
    "spec", ["sentencepiece", SIGLIP_TOKENIZER, "sentencepiece?sot=true", "siglip:{spm}", "siglip:{spm}?clean=lower"]
)
def test_sentencepiece_gives_the_same_ids(spec, tmp_path):
    ours = make_tokenizer(spec.format(spm=VOCAB_FOLDER / "emoji_4k.model"))
    theirs, config = written(ours)
    for text in TEXTS:
        ids = ours([text], 300)[0][: ours.lengths(ours([text], 300))[0]]
        assert theirs.encode(text).ids == ids.tolist(), text
    assert theirs.token_to_id(config["eos_token"]) == ours.eot_id
    assert theirs.token_to_id(config["pad_token"]) == (ours.eot_id if ours.options["pad_with_eot"] else ours.pad_id)
    assert config["model_max_length"] == 77
    if ours.options["pad_with_eot"]:  # SigLIP's tokenizer cleans texts as before after it is loaded again
        for name, content in export_tokenizer.for_hf(ours, 77).items():
            (tmp_path / name).write_text(json.dumps(content))
        again = make_tokenizer(find_tokenizer(tmp_path, "siglip", None))
        assert again(TEXTS, 300).tolist() == ours(TEXTS, 300).tolist()


@pytest.mark.parametrize("options", ["", "?lower=true", "?sot=true", "?pad_with_eot=true", "?sot=true&lower=true"])
@pytest.mark.parametrize("method", ["clip", "siglip", "align"])
def test_an_exported_sentencepiece_tokenizer_is_found_again(options, method, tmp_path):
    ours = make_tokenizer(f"sentencepiece{options}")
    files = export_tokenizer.for_hf(ours, 77)
    earlier = "lower" if "lower" in options else ""
    for clean in (files["tokenizer_config.json"]["clean"], earlier):
        files["tokenizer_config.json"]["clean"] = clean
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        again = make_tokenizer(find_tokenizer(tmp_path, method, 4096, "open_clip"))
        texts = [*TEXTS, "3.5 l: don't!"]
        assert again(texts, 40).tolist() == ours(texts, 40).tolist()
        assert (again.sot_id, again.eot_id) == (ours.sot_id, ours.eot_id)


def test_an_exported_tokenizer_with_another_padding_is_asked_for(tmp_path):
    for name, content in export_tokenizer.for_hf(make_tokenizer("sentencepiece"), 77).items():
        (tmp_path / name).write_text(json.dumps(content | ({"pad_token": "[PAD]"} if "pad_token" in content else {})))
    with pytest.raises(UserError, match=r"only <pad> is known as padding, not '\[PAD\]': give the tokenizer"):
        find_tokenizer(tmp_path, "siglip", 4096)


@pytest.mark.parametrize(
    "to, fields",
    [
        ("open_clip", dict(method="siglip", tokenizer="sentencepiece")),
        ("open_clip", dict(tokenizer="sentencepiece", text=dict(TEXT, pool="first", causal=False))),
        ("hf", dict(tokenizer="sentencepiece")),
        ("hf", dict(method="siglip", image=MAP, text=LAST, tokenizer="sentencepiece?pad_with_eot=false")),
        ("hf", dict(CASES["align"][1], tokenizer="wordpiece:{vocabulary}?lower=false")),
    ],
)
def test_an_export_is_loaded_with_its_tokenizer(to, fields, vocabulary, tmp_path):
    fields = fields | {"tokenizer": fields["tokenizer"].format(vocabulary=vocabulary)}
    model = make_model(**fields)
    export.export(model, to, tmp_path / "out")
    again = load.load(tmp_path / "out")
    texts = ["a 3.5 l Cat, PIZZA!", ""]
    assert again.tokenizer(texts, 20).tolist() == model.tokenizer(texts, 20).tolist()
    assert again.config.model.text.eot_id == model.config.model.text.eot_id


def test_padding_stored_in_a_tokenizer_json_is_not_exported(tmp_path):
    stored, _ = written(make_tokenizer("sentencepiece"))
    stored.enable_padding(length=64)
    stored.save(str(tmp_path / "tokenizer.json"))
    theirs, _ = written(make_tokenizer(f"siglip:{tmp_path}/tokenizer.json"))
    assert theirs.padding is None and len(theirs.encode("a cat").ids) < 10


def test_clips_tokenizer_of_transformers_is_refused_where_its_padding_is_seen(tmp_path):
    model = make_model(method="siglip", image=MAP, text=LAST)
    with pytest.raises(UserError, match="pads with the end of text. This text tower sees the padding, which is 0 here"):
        export.export(model, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export.export(model, "hf", tmp_path / "out", tokenizer=False)


def test_pixels_of_the_preprocessing_are_resized_with_the_model(tmp_path):
    model = make_model()
    model.config.unlock().eval.transform = ("resize(20)", "center_crop")
    export.export(model, "hf", tmp_path / "out")
    imported = load.load(tmp_path / "out", size=32)
    assert imported.config.eval.transform == ("resize(40, interpolation='bicubic')", "center_crop(rounding='down')")
    assert any("image tower: vit size=32" in line for line in imported.summary)
    assert any("preprocessing: resize(40, " in line for line in imported.summary)


def test_wordpiece_gives_the_same_ids(vocabulary):
    ours = make_tokenizer(f"wordpiece:{vocabulary}")
    theirs, config = written(ours)
    for text in TEXTS:
        assert theirs.encode(text).ids == ours([text], 300)[0][: ours.lengths(ours([text], 300))[0]].tolist()
    assert config["pad_token"] == "[PAD]" and "mask_token" not in config


def test_clip_bpe_is_written_as_published(tmp_path):
    files = export_tokenizer.for_hf(make_tokenizer("clip_bpe"), 77)
    vocab = files["vocab.json"]
    assert (
        len(vocab) == 49408
        and vocab["<|endoftext|>"] == 49407
        and vocab["cat</w>"] == make_tokenizer("clip_bpe").encode("cat")[0]
    )
    assert files["merges.txt"].count(b"\n") == 48895


@pytest.mark.parametrize(
    "spec, message",
    [
        ("clip_bpe?mask=true", "a tokenizer 'clip_bpe' with mask=True: export without it"),
        ("sentencepiece?eot=false", "with eot=False"),
        ("unifont", "cannot express a tokenizer 'unifont'"),
    ],
)
def test_tokenizers_that_transformers_cannot_express(spec, message):
    with pytest.raises(UserError, match=message):
        export_tokenizer.for_hf(make_tokenizer(spec), 77)


def test_clip_benchmark_gets_our_model_type(monkeypatch):
    seen = []
    models = types.SimpleNamespace(TYPE2FUNC={"open_clip": None}, MODEL_TYPES=["open_clip"])
    cli = types.SimpleNamespace(main=lambda: seen.append(sys.argv[1:]))
    monkeypatch.setitem(sys.modules, "clip_benchmark", types.SimpleNamespace(cli=cli, models=models))
    monkeypatch.setattr(sys, "argv", [])
    assert clip_benchmark.main(["eval", "--model=runs/clip"]) == 0
    assert clip_benchmark.main(["eval", "--model=x", "--pretrained=best", "--model_type", "open_clip"]) == 0
    assert clip_benchmark.main(["build", "a.json"]) == 0
    assert seen[0] == ["eval", "--model=runs/clip", "--model_type", "clip_jax", "--pretrained", "latest"]
    assert seen[1:] == [["eval", "--model=x", "--pretrained=best", "--model_type", "open_clip"], ["build", "a.json"]]
    assert (
        models.MODEL_TYPES == ["open_clip", "clip_jax"] and models.TYPE2FUNC["clip_jax"] is clip_benchmark.load_clip_jax
    )


def test_a_missing_clip_benchmark_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    assert clip_benchmark.main(["eval"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("pip install clip_benchmark\n") and error.count("\n") == 1
