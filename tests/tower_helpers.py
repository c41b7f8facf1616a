"""Random state dicts of single towers in the layouts of their libraries, and what a run reads of them."""

import numpy as np

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.normal(0, 0.1, shape).astype(np.float32)


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
            found |= {f"{block}.{name}.weight": 4 * random(*shape) for name, shape in shapes.items()}
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
