"""The layouts of single towers: Hugging Face's BertModel, ViTs of timm and DINO, ResNets of torchvision and timm."""

import re

from clip_jax.interop.layouts import CONV, LINEAR_OUT, batch_norm, depth, entry, fused, linear, norm, present
from clip_jax.interop.layouts.hf import bert_encoder

#: BERT's pooler and heads of its training, and position ids.
BERT_IGNORED = (r"pooler\..*", r"cls\..*", r"embeddings\.position_ids")
#: Classification heads.
RESNET_IGNORED = (r"fc\..*", r".*\.num_batches_tracked")
TIMM_IGNORED = (r"head\..*", r"head_dist\..*", r"fc_norm\..*", r"pre_logits\..*")


def bert_entries(ours):
    """Returns the layout of a BertModel, names without `bert.`."""
    return present(list(bert_encoder(ours, "")), ours)


def timm_vit_entries(ours, prefix="", image="params/img"):
    """Returns the layout of timm's vision transformer."""
    entries = [
        entry(f"{prefix}patch_embed.proj.weight", f"{image}/patch/kernel", CONV),
        entry(f"{prefix}patch_embed.proj.bias", f"{image}/patch/bias"),
        entry(f"{prefix}cls_token", f"{image}/cls"),
        entry(f"{prefix}pos_embed", f"{image}/pos"),
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
    return present(entries, ours)


def resnet_entries(ours):
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
