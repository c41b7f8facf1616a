"""The published recipes that start from or look up towers of others, from small random files in the real layouts."""

import jax
import numpy as np
import pytest
from conftest import REPO
from helpers import TINY
from tower_helpers import (
    SMALL,
    bert_tensors,
    google_tensors,
    mpnet_tensors,
    resnet_tensors,
    timm_tensors,
    vocabulary,
    write_sentence_transformer,
    write_tower,
)

from clip_jax import config, init_from, train
from clip_jax.errors import UserError
from clip_jax.runtime import sharding
from clip_jax.training.step import make_init, make_step, state_shapes

BERT = dict(model_type="bert", num_attention_heads=4)
#: A published run at the size of the files below: only sizes, data and lengths differ.
RUN = """
    data.batch_size=8 data.workers=0 train.steps=1 optim.warmup_steps=0 micro_batches=1 model.dtype=float32
""".split()
TEXT = """
    model.embed_dim=32 model.text.width=32 model.text.depth=2 model.text.heads=4 model.text.mlp_dim=48
    model.text.positions=20 model.text.context=12
""".split()
VIT = "model.image.size=32 model.image.width=32 model.image.depth=1 model.image.heads=2 model.image.mlp_dim=64".split()
RESNET = "model.image.size=32 model.image.width=8 model.image.layers=(1,1,1,1) optim.lr_hold_steps=0".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Towers by name, and the tokenizer of the BERT."""
    root = tmp_path_factory.mktemp("towers")
    colours = {"pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    found = {"resnet": write_tower(root / "resnet", resnet_tensors(), {"architecture": "resnet50"} | colours)}
    found["bert"] = write_tower(root / "bert", bert_tensors(), BERT)
    np.savez(root / "B_16.npz", **google_tensors())
    return found | {
        "vit": root / "B_16.npz",
        "vocabulary": vocabulary(root / "bert", ("[PAD]", "[CLS]", "[SEP]", "[MASK]")),
    }


def run(recipe, workdir, *overrides):
    """Takes one step of a recipe on one device; returns `(configuration, state, line of init_from)`.

    Parameters that no file holds start at small random values: compiling the initialisation would take longer than the
    step.
    """
    c = config.load(str(REPO / "configs" / recipe), [*RUN, *overrides])
    resolved, source, tokenizer, method = train.make_parts(c)
    init_from.check(resolved, tokenizer, workdir)
    mesh = sharding.make_mesh(resolved.mesh, jax.devices()[:1])
    init, tx = make_init(resolved, method, method.batch_spec(8))
    one, rng = sharding.NamedSharding(mesh, jax.P()), np.random.default_rng(0)
    shapes, line = state_shapes(init), ""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes.params)
    state = zeros.replace(params=params, extra=method.init_from_data(zeros.extra, source, mesh))
    state = jax.device_put(state, one)
    with jax.set_mesh(mesh):
        if resolved.init_from:
            state, line = init_from.start(resolved, state, tokenizer)
        loader = train.make_loader(resolved, source, tokenizer, method, mesh, 0)
        batch = sharding.to_global(next(iter(loader)), mesh)
        loader.close()
        state, metrics = jax.jit(make_step(resolved, method, tx))(state, batch)
    assert np.isfinite(metrics["loss"]) and int(state.bad_steps) == 0
    return c, jax.tree.map(np.asarray, state), line


def test_otter_starts_from_a_resnet_and_a_bert(files, tmp_path):
    c, found, line = run(
        "otter.py:otter", tmp_path, *RESNET, *TEXT, "data.augment=resize(40),random_crop", "data.source=emoji",
        f"tokenizer=wordpiece:{files['vocabulary']}", f"init_from=img={files['resnet']}, txt={files['bert']}",
        "optim.lr=1e-6",
    )  # fmt: skip
    assert "started from img=" in line
    conv = resnet_tensors()["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(found.params["img"]["conv1"]["kernel"], conv, atol=1e-4)
    words = bert_tensors()["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_allclose(found.params["txt"]["bert"]["embed"]["embedding"], words, atol=1e-4)
    assert found.params["img"]["proj"]["kernel"].shape == (256, 32)
    with c.unlocked():
        c.init_from_allow = ()
    source = init_from._foreign(str(files["resnet"]))
    with pytest.raises(UserError, match="model.image_mean=.* there, .* here"):
        init_from._check_meaning(c, source, {"img/conv1/kernel"}, None)
    source = init_from._foreign(str(files["bert"]))
    source.config.model.text.first_position = 2  # as in MPNet, whose array of positions has the same shape
    with pytest.raises(UserError, match="model.text.first_position=2 there, 0 here"):
        init_from._check_meaning(c, source, {"txt/bert/pos"}, None)


def test_zerovl_starts_from_timms_vit_and_a_bert(files, tmp_path):
    """The ViT has other colours, which the recipe allows."""
    tensors = timm_tensors(width=32, depth=1, patch=16, mlp=64)
    colours = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    vit = write_tower(tmp_path / "vit", tensors, {"model_args": {"num_heads": 2}} | colours)
    _, found, line = run(
        "zerovl.py:b16", tmp_path, *VIT, *TEXT, f"tokenizer=wordpiece:{files['vocabulary']}", "optim.lr=1e-6",
        "data.source=emoji?by=vendor", f"init_from=img={vit}, txt={files['bert']}",
    )  # fmt: skip
    assert "started from img=" in line
    dense = tensors["blocks.0.mlp.fc1.weight"].T
    np.testing.assert_allclose(found.params["img"]["block_0"]["mlp"]["fc1"]["kernel"], dense, atol=1e-4)


def test_lit_locks_googles_vit_and_tunes_a_bert(files, tmp_path):
    _, found, line = run(
        "lit.py:b16", tmp_path, *VIT, *TEXT, f"tokenizer=wordpiece:{files['vocabulary']}?eot=false",
        "data.source=emoji", f"init_from=img={files['vit']}, txt={files['bert']}",
    )  # fmt: skip
    assert "started from img=" in line
    arrays = google_tensors()
    np.testing.assert_array_equal(found.params["img"]["cls"], arrays["cls"])
    np.testing.assert_array_equal(found.params["img"]["pos"], arrays["Transformer/posembed_input/pos_embedding"])
    words = bert_tensors()["bert.embeddings.word_embeddings.weight"]
    assert (np.asarray(found.params["txt"]["bert"]["embed"]["embedding"]) != words).any()


def test_raclip_looks_up_by_a_vit_and_a_sentence_transformer(tmp_path):
    image = write_tower(tmp_path / "dino", timm_tensors(), SMALL)
    cfg = dict(model_type="mpnet", num_attention_heads=4, layer_norm_eps=1e-12, pad_token_id=1)
    text = write_sentence_transformer(
        tmp_path / "mpnet", mpnet_tensors(bert_tensors()), cfg, ("<s>", "<pad>", "</s>")
    )  # fmt: skip
    tiny = [override for override in TINY if override.startswith("model.") and "stem" not in override]
    _, found, _ = run(
        "raclip.py:b32", tmp_path / "run", *tiny, "data.source=emoji?part=record:2/60", "raclip.heads=2",
        "raclip.k=4", "raclip.reference=emoji?part=record:1/60", f"raclip.encoder=img={image}, txt={text}",
    )  # fmt: skip
    bank = found.extra["bank"]
    assert bank["image"].shape[1:] == (64,) and bank["text"].shape[1:] == (32,)
    rows = np.asarray(bank["image"])[: int(bank["count"])]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    weights = found.extra["encoder"]["params"]
    np.testing.assert_array_equal(weights["cls"], timm_tensors()["cls_token"])


def test_what_may_contradict_a_source_is_one_of_the_checked_fields(tmp_path):
    c = config.load(str(REPO / "configs" / "otter.py:otter"), ["init_from_allow=model.image.size"])
    with pytest.raises(UserError, match="init_from_allow 'model.image.size'"):
        init_from.check(c, None, tmp_path)
