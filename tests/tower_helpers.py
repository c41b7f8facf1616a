"""Random state dicts of single towers in the layouts of their libraries, and what a run reads of them."""

import functools
import json
import math

import numpy as np
from safetensors.numpy import save_file

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


def random(*shape):
    return RNG.normal(0, 0.1, shape).astype(np.float32)


def seeded(make):
    """Makes the tensors of `make`, and the random numbers after it, independent of what ran before."""

    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        RNG.bit_generator.state = START
        return make(*args, **kwargs)

    return wrapped


#: A configuration beside the tensors of `timm_tensors`, whose width is that of no published model.
SMALL = {"model_args": {"num_heads": 4}}


@seeded
def bert_tensors(width=32, depth=2, mlp=48, vocab=41, positions=20):
    """Returns a state dict with the names of Hugging Face's BertForPreTraining and TensorFlow's names of norms."""
    found = {"cls.predictions.bias": random(vocab), "bert.pooler.dense.weight": random(width, width)}
    sizes = {"word": vocab, "position": positions, "token_type": 2}
    for name, size in sizes.items():
        found[f"bert.embeddings.{name}_embeddings.weight"] = random(size, width)
    norms = ["embeddings.LayerNorm"]
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        shapes = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        shapes |= {"attention.output.dense": (width, width), "intermediate.dense": (mlp, width)}
        for name, shape in (shapes | {"output.dense": (width, mlp)}).items():
            found[f"bert.{layer}.{name}.weight"], found[f"bert.{layer}.{name}.bias"] = random(*shape), random(shape[0])
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        found[f"bert.{name}.gamma"], found[f"bert.{name}.beta"] = 1 + random(width), random(width)
    return found


def bert_by_hand(t, ids, heads, pad=0, first=0, bias=0.0):
    """The last hidden state of BERT in NumPy, float64 (Devlin et al. 2019).

    MPNet's first position is not 0, and it adds a `bias` `[heads, n, n]` to the scores.
    """

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * t[f"bert.{name}.gamma"] + t[f"bert.{name}.beta"]

    def linear(x, name):
        return x @ t[f"bert.{name}.weight"].T + t[f"bert.{name}.bias"]

    t = {name: x.astype(np.float64) for name, x in t.items()}
    word, position, kind = (t[f"bert.embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    x = norm(word[ids] + position[first : first + ids.shape[1]] + kind[0], "embeddings.LayerNorm")
    for i in range(2):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{n}").reshape(*x.shape[:2], heads, -1) for n in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
        scores = np.where((ids != pad)[:, None, None], scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = norm(x + linear(y, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        y = linear(x, f"{layer}.intermediate.dense")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
        x = norm(x + linear(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def mpnet_tensors(bert, buckets=32, heads=4):
    """Returns the tensors of `bert_tensors` under the names of Hugging Face's MPNetModel, with biases of distances."""
    names = {"bert.": "", "attention.self.query": "attention.attn.q", "attention.self.key": "attention.attn.k"}
    names |= {"attention.self.value": "attention.attn.v", "attention.output.dense": "attention.attn.o"}
    names |= {"attention.output.LayerNorm": "attention.LayerNorm", ".gamma": ".weight", ".beta": ".bias"}
    found = {"encoder.relative_attention_bias.weight": 5 * random(buckets, heads)}
    for name, x in bert.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if not name.startswith(("cls.", "embeddings.token_type")):
            found[name] = x
    return found


def vocabulary(folder, first=("[PAD]", "[CLS]", "[SEP]"), size=41):
    """Writes a vocabulary of single words, w0, w1, ...; returns its path."""
    pieces = [*first, "[UNK]", *(f"w{i}" for i in range(size - len(first) - 1))]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    return folder / "vocab.txt"


def write_tower(folder, tensors, cfg=SMALL):
    """Writes a folder of Hugging Face with weights and `config.json`; returns it."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def write_sentence_transformer(
    folder, tensors, cfg, first, modules=("Transformer", "Pooling", "Normalize"), pool="mean"
):
    """Writes the folder of a sentence transformer; returns it."""
    write_tower(folder, tensors, cfg)
    vocabulary(folder, first)
    types = [f"sentence_transformers.models.{name}" for name in modules]
    paths = ["" if not i else f"{i}_{name}" for i, name in enumerate(modules)]
    rows = [dict(idx=i, name=str(i), path=path, type=t) for i, (path, t) in enumerate(zip(paths, types, strict=True))]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}": name.startswith(pool) for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes | {"word_embedding_dimension": 32}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 18}))
    return folder


@seeded
def timm_tensors(width=64, depth=2, patch=8, grid=2, mlp=96, scale=False, registers=0, cls_position=True):
    """Returns a state dict with timm's names of a vision transformer, with a head of 10 classes."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, cls_position + grid**2, width), "head.weight": (10, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    layers = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
    }
    shapes |= {"reg_token": (1, registers, width)} if registers else {}
    for i in range(depth):
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
        shapes |= {f"blocks.{i}.ls{n}.gamma": (width,) for n in (1, 2) if scale}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "head.bias": (10,)}
    return {name: random(*shape) for name, shape in shapes.items()}


def vit_by_hand(t, images, heads):
    """The class token after the last norm in NumPy, float64, with timm's names; layer scale and registers optional."""
    t = {name: x.astype(np.float64) for name, x in t.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    kernel = t["patch_embed.proj.weight"]
    patch = kernel.shape[2]
    b, size = len(images), images.shape[1]
    x = images.reshape(b, size // patch, patch, size // patch, patch, 3)
    x = np.einsum("byixjc,ocij->byxo", x, kernel).reshape(b, -1, len(kernel)) + t["patch_embed.proj.bias"]
    pos, cls = t["pos_embed"], np.broadcast_to(t["cls_token"], (b, 1, len(kernel)))
    first = pos.shape[1] - x.shape[1]
    parts = [cls + pos[:, :first] if first else cls, x + pos[:, first:]]
    if "reg_token" in t:
        parts.insert(1, np.broadcast_to(t["reg_token"], (b, *t["reg_token"].shape[1:])))
    x = np.concatenate(parts, axis=1)
    for i in range(2):
        o = f"blocks.{i}"
        q, k, v = np.moveaxis(linear(norm(x, f"{o}.norm1"), f"{o}.attn.qkv").reshape(b, -1, 3, heads, 16), 2, 0)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 4
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v).reshape(x.shape)
        x = x + linear(y, f"{o}.attn.proj") * t.get(f"{o}.ls1.gamma", 1.0)
        y = linear(norm(x, f"{o}.norm2"), f"{o}.mlp.fc1")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
        x = x + linear(y, f"{o}.mlp.fc2") * t.get(f"{o}.ls2.gamma", 1.0)
    return norm(x, "norm")[:, 0]


def hf_vit_tensors(timm, dino):
    """Returns the tensors of a timm vision transformer under the names of Hugging Face's ViTModel or Dinov2Model."""
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token"}
    names |= {"reg_token": "embeddings.register_tokens", "pos_embed": "embeddings.position_embeddings"}
    names |= {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1"}
    names |= {"ls2.gamma": "layer_scale2.lambda1", "blocks.": "encoder.layer."}
    if not dino:
        names |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    found = (
        {"embeddings.mask_token": random(1, timm["cls_token"].shape[2])} if dino else {"pooler.dense.bias": random(4)}
    )
    for name, x in timm.items():
        if name.startswith("head."):
            continue
        name = name if not name.startswith("norm.") else f"layernorm.{name[5:]}"
        for old, new in names.items():
            name = name.replace(old, new)
        if "attn.qkv" in name:
            for part, y in zip(("query", "key", "value"), np.split(x, 3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = np.ascontiguousarray(y)
        else:
            found[name] = x
    return found


@seeded
def google_tensors(width=32, heads=2, patch=16, grid=2, mlp=64, head=0):
    """Returns the arrays of a vision transformer of Google with the names from before flax.linen; one block."""
    block, wide = "Transformer/encoderblock_0", (heads, width // heads)
    shapes = {"embedding": (patch, patch, 3, width), f"{block}/MlpBlock_3/Dense_0": (width, mlp)}
    shapes |= {f"{block}/MlpBlock_3/Dense_1": (mlp, width)} | ({"head": (width, head)} if head else {})
    found = {f"{name}/kernel": random(*shape) for name, shape in shapes.items()}
    found |= {f"{name}/bias": random(shape[-1]) for name, shape in shapes.items()}
    attention = f"{block}/MultiHeadDotProductAttention_1"
    for name in ("query", "key", "value"):
        found |= {f"{attention}/{name}/kernel": random(width, *wide), f"{attention}/{name}/bias": random(*wide)}
    found |= {f"{attention}/out/kernel": random(*wide, width), f"{attention}/out/bias": random(width)}
    for name in (f"{block}/LayerNorm_0", f"{block}/LayerNorm_2", "Transformer/encoder_norm"):
        found |= {f"{name}/scale": 1 + random(width), f"{name}/bias": random(width)}
    found["Transformer/posembed_input/pos_embedding"] = random(1, 1 + grid**2, width)
    return found | {"cls": random(1, 1, width)}


@seeded
def resnet_tensors(width=8, layers=(1, 1, 1, 1)):
    """Returns a state dict with the names of torchvision's ResNet with bottlenecks."""
    found = {"conv1.weight": random(width, 3, 7, 7), "fc.weight": random(10, 32 * width), "fc.bias": random(10)}
    inputs, norms = width, {"bn1": width}
    for i, count in enumerate(layers):
        for j in range(count):
            block, narrow = f"layer{i + 1}.{j}", width * 2**i
            shapes = {
                "conv1": (narrow, inputs, 1, 1),
                "conv2": (narrow, narrow, 3, 3),
                "conv3": (4 * narrow, narrow, 1, 1),
            }
            norms |= {f"{block}.bn{n}": shapes[f"conv{n}"][0] for n in (1, 2, 3)}
            if not j:
                shapes["downsample.0"], norms[f"{block}.downsample.1"] = (4 * narrow, inputs, 1, 1), 4 * narrow
            found |= {
                f"{block}.{name}.weight": 10 * math.prod(s[1:]) ** -0.5 * random(*s) for name, s in shapes.items()
            }
            inputs = 4 * narrow
    for name, size in norms.items():
        found |= {
            f"{name}.weight": 1 + random(size),
            f"{name}.bias": random(size),
            f"{name}.running_mean": random(size),
        }
        found |= {f"{name}.running_var": 1 + abs(random(size)), f"{name}.num_batches_tracked": np.array(7)}
    return found


def read_params(source):
    """Returns all arrays of an `init_from.Source`, nested, on one device."""
    import jax
    from flax import traverse_util

    one = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), jax.P())
    targets = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for p, x in source.shapes.items()}
    return traverse_util.unflatten_dict(source.load(targets), sep="/")
