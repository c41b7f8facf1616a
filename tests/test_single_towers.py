"""Single towers that a run starts from: BERT, timm's ViT, the old names of big_vision's; one source for each tower."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_files
from safetensors.numpy import load_file, save_file
from tower_helpers import bert_by_hand, bert_tensors, read_params

from clip_jax import init_from
from clip_jax.errors import UserError
from clip_jax.interop import load, recognize
from clip_jax.interop.towers.files import sources
from clip_jax.interop.towers.load import resize_text_positions
from clip_jax.models.bert import BertTower


@pytest.fixture
def bert(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    tensors = bert_tensors()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": 4}))
    return folder, tensors


def test_bert_is_its_formula(bert):
    folder, tensors = bert
    foreign = recognize.recognize(folder)
    assert foreign.kind == "Hugging Face BertModel" and foreign.config.model.text.heads == 4
    source = init_from._foreign(str(folder))
    ids = np.array([[2, 5, 9, 3, 0, 0], [2, 7, 3, 0, 0, 0]], np.int32)
    wanted = bert_by_hand(tensors, ids, 4)
    params = read_params(source)
    for pool in ("first", "mean"):
        fields = dict(vocab_size=41, width=32, depth=2, heads=4, mlp_dim=48, positions=20, context=6, embed_dim=0)
        tower = BertTower(**fields, eot_id=3, pad_id=0, pool=pool)
        pooled, states = tower.apply({"params": params["txt"]}, jnp.asarray(ids))
        real = (ids != 0)[..., None]
        np.testing.assert_allclose(np.asarray(states) * real, wanted * real, rtol=2e-4, atol=2e-5)
        mean = (wanted * real).sum(1) / real.sum(1)
        np.testing.assert_allclose(pooled, wanted[:, 0] if pool == "first" else mean, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("path", golden_files("hf_align/model.safetensors"))
def test_bert_is_the_text_tower_of_the_golden_align(path, tmp_path):
    theirs = load_file(path)
    bert = {k.removeprefix("text_model."): v for k, v in theirs.items() if k.startswith("text_model.")}
    (tmp_path / "bert").mkdir()
    save_file(bert, tmp_path / "bert" / "model.safetensors")
    cfg = json.loads((pathlib.Path(path).parent / "config.json").read_text())["text_config"]
    heads = {"num_attention_heads": cfg["num_attention_heads"]}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(heads))
    found = read_params(init_from._foreign(str(tmp_path / "bert")))["txt"]["bert"]
    align = load.load(pathlib.Path(path).parent, tokenizer=None).params["txt"]["bert"]
    jax.tree.map(np.testing.assert_array_equal, found, align)


@pytest.mark.parametrize(
    "text, message",
    [("img=a, img=b", "give one path, or one for each tower"), ("image=a, txt=b", "img=PATH, txt=PATH")],
)
def test_wrong_sources(text, message):
    with pytest.raises(UserError, match=message):
        sources(text)


def test_one_path_is_the_source_of_both_towers():
    assert sources("runs/a=b, c") == {"": "runs/a=b, c"}
    assert sources("img=/a/b.npz") == {"img/": "/a/b.npz"}


def test_what_does_not_fit_is_named(tmp_path):
    (tmp_path / "bert").mkdir()
    save_file(bert_tensors(), tmp_path / "bert" / "model.safetensors")
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    with pytest.raises(UserError, match="model_type='roberta' is not supported"):
        init_from._foreign(str(tmp_path / "bert"))


def test_names_of_big_vision_before_linen():
    old = {
        "Transformer/encoderblock_0/LayerNorm_2/scale": 1,
        "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": 2,
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": 3,
        "Transformer/posembed_input/pos_embedding": 4,
    }
    assert recognize._modernize(old) == {
        "Transformer/encoderblock_0/LayerNorm_1/scale": 1,
        "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": 2,
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel": 3,
        "pos_embedding": 4,
    }


def test_text_positions_are_interpolated():
    pos = np.arange(5, dtype=np.float32).reshape(1, 5, 1) ** 2
    np.testing.assert_allclose(resize_text_positions(pos, 9)[0, :, 0], [0, 0.5, 1, 2.5, 4, 6.5, 9, 12.5, 16])
    np.testing.assert_allclose(resize_text_positions(pos, 3)[0, :, 0], [0, 4, 16])
