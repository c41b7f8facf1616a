"""The layouts of single towers: BertModel, MPNetModel, ViTs of timm, DINO, DINOv2 and Hugging Face, ResNets."""

import re

from clip_jax.interop.layouts import (
    CONV,
    KEEP,
    LINEAR_OUT,
    WithoutFirst,
    batch_norm,
    depth,
    entry,
    fused,
    linear,
    norm,
    present,
)
from clip_jax.interop.layouts.hf import bert_encoder

#: BERT's and MPNet's pooler and heads of their training, and position ids.
BERT_IGNORED = (r"pooler\..*", r"cls\..*", r"lm_head\..*", r"embeddings\.position_ids")
#: Classification heads, and the token of DINOv2's masked patches.
RESNET_IGNORED = (r"fc\..*", r".*\.num_batches_tracked")
TIMM_IGNORED = (r"head\..*", r"head_dist\..*", r"fc_norm\..*", r"pre_logits\..*", "mask_token")
HF_IGNORED = (r"pooler\..*", r"classifier\..*", r"embeddings\.mask_token")


def bert(ours):
    """Returns the layout of a BertModel, names without `bert.`."""
    return present(list(bert_encoder(ours, "")), ours)


def mpnet(ours):
    """Returns the layout of an MPNetModel, names without `mpnet.`."""
    names = {"self.query": "attn.q", "self.key": "attn.k", "self.value": "attn.v", "output.dense": "attn.o"}
    names["output.LayerNorm"] = "LayerNorm"

    def renamed(name):
        for old, new in names.items():
            name = name.replace(f".attention.{old}.", f".attention.{new}.")
        return name

    entries = [entry(renamed(e.theirs), e.ours, e.op) for e in bert_encoder(ours, "")]
    entries.append(entry("encoder.relative_attention_bias.weight", "params/txt/bert/relative"))
    return present(entries, ours)


def timm_vit(ours, prefix="", image="params/img", cls_position=True, dino=False):
    """Returns the layout of timm's vision transformer.

    Args:
      ours: `{path: ...}` of our parameters.
      prefix: of their names.
      image: our path of the tower.
      cls_position: whether the class token has a position embedding, the first row.
      dino: whether the registers have the name of DINOv2's released files.
    """
    positions = KEEP if cls_position or f"{image}/cls" not in ours else WithoutFirst()
    entries = [
        entry(f"{prefix}patch_embed.proj.weight", f"{image}/patch/kernel", CONV),
        entry(f"{prefix}patch_embed.proj.bias", f"{image}/patch/bias"),
        entry(f"{prefix}cls_token", f"{image}/cls"),
        entry(f"{prefix}{'register_tokens' if dino else 'reg_token'}", f"{image}/registers"),
        entry(f"{prefix}pos_embed", f"{image}/pos", positions),
        *norm(f"{prefix}norm", f"{image}/ln_post"),
    ]
    for i in range(depth(ours, image)):
        t, o = f"{prefix}blocks.{i}", f"{image}/block_{i}"
        entries += norm(f"{t}.norm1", f"{o}/ln1")
        entries += fused(f"{t}.attn.qkv.weight", f"{t}.attn.qkv.bias", f"{o}/attn")
        entries += linear(f"{t}.attn.proj", f"{o}/attn/out", LINEAR_OUT)
        entries += norm(f"{t}.norm2", f"{o}/ln2")
        entries += linear(f"{t}.mlp.fc1", f"{o}/mlp/fc1")
        entries += linear(f"{t}.mlp.fc2", f"{o}/mlp/fc2")
        entries += [entry(f"{t}.ls{n}.gamma", f"{o}/ls{n}/scale") for n in (1, 2)]
    return present(entries, ours)


def hf_vit(ours, dino):
    """Returns the layout of Hugging Face's ViTModel, or with `dino` of its Dinov2Model."""
    names = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
    if not dino:
        names = ("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")
    img, embeddings = "params/img", "embeddings"
    entries = [
        entry(f"{embeddings}.patch_embeddings.projection.weight", f"{img}/patch/kernel", CONV),
        entry(f"{embeddings}.patch_embeddings.projection.bias", f"{img}/patch/bias"),
        entry(f"{embeddings}.cls_token", f"{img}/cls"),
        entry(f"{embeddings}.register_tokens", f"{img}/registers"),
        entry(f"{embeddings}.position_embeddings", f"{img}/pos"),
        *norm("layernorm", f"{img}/ln_post"),
    ]
    for i in range(depth(ours, img)):
        t, o = f"encoder.layer.{i}", f"{img}/block_{i}"
        entries += norm(f"{t}.{names[0]}", f"{o}/ln1")
        for name in ("query", "key", "value"):
            entries += linear(f"{t}.attention.attention.{name}", f"{o}/attn/{name}")
        entries += linear(f"{t}.attention.output.dense", f"{o}/attn/out", LINEAR_OUT)
        entries += norm(f"{t}.{names[1]}", f"{o}/ln2")
        entries += linear(f"{t}.{names[2]}", f"{o}/mlp/fc1")
        entries += linear(f"{t}.{names[3]}", f"{o}/mlp/fc2")
        entries += [entry(f"{t}.layer_scale{n}.lambda1", f"{o}/ls{n}/scale") for n in (1, 2)]
    return present(entries, ours)


def resnet(ours):
    """Returns the layout of torchvision's ResNet with bottlenecks, which timm's has too."""
    return present([*conv_norm("conv1", "bn1", "img/conv1", "img/bn1"), *bottlenecks(ours, "")], ours)


def bottlenecks(ours, prefix):
    """Yields the entries of a ResNet's bottlenecks, whose names begin with `prefix`."""
    numbers = {(int(m[1]), int(m[2])) for path in ours if (m := re.match(r"params/img/layer_(\d+)_(\d+)/", path))}
    for layer, j in sorted(numbers):
        t, o = f"{prefix}layer{layer}.{j}", f"img/layer_{layer}_{j}"
        for i in (1, 2, 3):
            yield from conv_norm(f"{t}.conv{i}", f"{t}.bn{i}", f"{o}/conv{i}", f"{o}/bn{i}")
        yield from conv_norm(f"{t}.downsample.0", f"{t}.downsample.1", f"{o}/downsample_conv", f"{o}/downsample_bn")


def conv_norm(conv, bn, our_conv, our_bn):
    """Returns the entries of a convolution without bias and of its batch norm; our paths lack the prefix `params/`."""
    return [entry(f"{conv}.weight", f"params/{our_conv}/kernel", CONV), *batch_norm(bn, our_bn)]
