"""MPNet and sentence transformers: their formula in float64, their folders, and their use as frozen encoders."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tower_helpers import (
    SMALL,
    bert_by_hand,
    bert_tensors,
    mpnet_tensors,
    read_params,
    timm_tensors,
    vit_by_hand,
    write_sentence_transformer,
    write_tower,
)

from clip_jax import init_from
from clip_jax.errors import UserError
from clip_jax.methods.frozen_encoders import make_encoder, stored_config
from clip_jax.models.towers import text_tower

BERT = dict(model_type="bert", num_attention_heads=4)
MPNET = dict(model_type="mpnet", num_attention_heads=4, layer_norm_eps=1e-12, pad_token_id=1)
BERT_PIECES, MPNET_PIECES = ("[PAD]", "[CLS]", "[SEP]"), ("<s>", "<pad>", "</s>")


def bias_by_hand(table, n):
    """MPNet's bias of a query i and a key j: 8 distances alone, then 8 ranges up to 128, on each side."""

    def bucket(i, j):
        far = abs(i - j)
        place = far if far < 8 else min(15, 8 + int(math.log(far / 8) / math.log(16) * 8 + 1e-9))
        return place + 16 * (j > i)

    return np.array([[table[bucket(i, j)] for j in range(n)] for i in range(n)]).transpose(2, 0, 1)


def test_mpnet_is_its_formula(tmp_path):
    bert = bert_tensors(positions=60)
    tensors = mpnet_tensors(bert)
    folder = write_tower(tmp_path / "mpnet", {f"mpnet.{name}": x for name, x in tensors.items()}, MPNET)
    source = init_from._foreign(str(folder))
    assert source.config.model.text.context == 58
    model = source.config.model
    with model.unlocked():
        model.text.pool = "mean"
    ids = np.array([[0, *range(3, 38), 2], [0, 5, 9, 2] + [1] * 33], np.int32)
    bias = bias_by_hand(tensors["encoder.relative_attention_bias.weight"].astype(np.float64), ids.shape[1])
    bert["bert.embeddings.token_type_embeddings.weight"][:] = 0
    wanted = bert_by_hand(bert, ids, 4, pad=1, first=2, bias=bias)
    pooled, states = text_tower(model).apply({"params": read_params(source)["txt"]}, jnp.asarray(ids))
    real = (ids != 1)[..., None]
    np.testing.assert_allclose(np.asarray(states) * real, wanted * real, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(pooled, (wanted * real).sum(1) / real.sum(1), rtol=2e-4, atol=2e-5)
    without = bert_by_hand(bert, ids, 4, pad=1, first=2)
    assert np.abs((without - wanted) * real).max() > 0.01


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_one_encoder_for_each_tower(tmp_path, kind):
    timm, bert = timm_tensors(), bert_tensors()
    image = write_tower(tmp_path / "dino", timm, SMALL)
    tensors, cfg, pieces = (bert, BERT, BERT_PIECES) if kind == "bert" else (mpnet_tensors(bert), MPNET, MPNET_PIECES)
    text = write_sentence_transformer(tmp_path / "text", tensors, cfg, pieces)
    name = f"img={image}, txt={text}"
    stored = stored_config(name)
    encoder = make_encoder(name, stored)
    assert (encoder.size, encoder.image_dim, encoder.text_dim) == (16, 64, 32)
    weights = encoder.load(None)
    texts = ["w1 w2 w3", "", " ".join(f"w{i}" for i in range(30))]
    found = encoder.embed_text(texts)
    pad, first, bias = (0, 0, 0.0) if kind == "bert" else (1, 2, None)
    sot, eot = (1, 2) if kind == "bert" else (0, 2)
    for row, words in zip(found, [[5, 6, 7], [], list(range(4, 20))], strict=True):
        ids = np.array([[sot, *words, eot]])  # 18 tokens at most
        if kind == "mpnet":
            table = tensors["encoder.relative_attention_bias.weight"].astype(np.float64)
            bias = bias_by_hand(table, ids.shape[1])
            bert["bert.embeddings.token_type_embeddings.weight"][:] = 0
        wanted = bert_by_hand(bert, ids, 4, pad, first, bias).mean(1)
        np.testing.assert_allclose(row, unit(wanted)[0], rtol=2e-4, atol=2e-5)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    colours = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    wanted = unit(vit_by_hand(timm, (images / 255 - colours[0]) / colours[1], 4))
    np.testing.assert_allclose(encoder.embed_image(weights, images), wanted, rtol=1e-4, atol=1e-5)
    # What a checkpoint keeps suffices without the files.
    shutil.rmtree(image)
    shutil.rmtree(text)
    again = make_encoder(name, stored)
    assert jax.tree.map(jnp.shape, again.variables()) == jax.tree.map(jnp.shape, weights)
    np.testing.assert_array_equal(again.embed_image(weights, images), encoder.embed_image(weights, images))


def test_encoders_that_do_not_fit_are_one_line(tmp_path):
    image = write_tower(tmp_path / "dino", timm_tensors(), SMALL)
    tensors = bert_tensors()
    plain = write_tower(tmp_path / "bert", tensors, BERT)
    dense = ("Transformer", "Pooling", "Dense")
    cases = {
        f"img={image}": "give both towers, img=ENCODER, txt=ENCODER",
        f"img={plain}, txt=pixels": "holds no image tower alone",
        f"img={image}, txt={image}": "holds no text tower alone",
        f"img=pixels, txt={plain}": "modules.json is missing",
        f"img={image}, img={image}": "encoder=.*: give one path, or one for each tower",
    }
    for folder, options, message in (
        ("dense", dict(modules=dense), "its modules are Transformer, Pooling, Dense"),
        ("max", dict(pool="max"), r"pooling \['max_tokens'\]"),
        ("vocabulary", dict(first=MPNET_PIECES), "pads with 1, but its text tower has 41 and 0"),
    ):
        options = dict(first=BERT_PIECES) | options
        path = write_sentence_transformer(tmp_path / folder, tensors, BERT, **options)
        cases[f"img=pixels, txt={path}"] = message
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            stored_config(name)
        assert "\n" not in str(error.value)
