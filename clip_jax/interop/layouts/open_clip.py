"""The layout of OpenAI's and open_clip's state dicts. Image towers: ViT, ModifiedResNet, timm's ViT (SigLIP).

PyramidCLIP's released state dicts differ little: the blocks have two parts, and the first part of the image tower has
other MLPs.
"""

from clip_jax.interop.layouts import (
    CONV,
    LINEAR_OUT,
    TABLE,
    VECTOR,
    batch_norm,
    depth,
    entry,
    fused,
    linear,
    norm,
    present,
)
from clip_jax.interop.layouts.towers import bottlenecks, conv_norm, timm_vit

#: Further values of OpenAI's archives, and counters of PyTorch's batch norms.
IGNORED = ("input_resolution", "context_length", "vocab_size", r"(.*\.)?attn_mask", r".*\.num_batches_tracked")


def entries(ours, custom_text=False, timm=False, parts=(0, 0)):
    """Returns the layout.

    Args:
      ours: `{path: ...}` of our parameters.
      custom_text: whether the text tower has the prefix `text.` (`CustomTextCLIP`).
      timm: whether the image tower is timm's.
      parts: PyramidCLIP's numbers of blocks in the first part of the image and of the text tower; 0: one part.
    """
    image = _timm(ours) if timm else _resnet(ours) if "params/img/stem/conv1/kernel" in ours else _vit(ours, parts)
    prefix = "text." if custom_text else ""
    scalars = [entry(name, f"params/{name}") for name in ("logit_scale", "logit_bias")]
    return present([*image, *_text(ours, prefix, parts), *scalars], ours)


def _blocks(theirs, tower, ours, first):
    """Yields the entries of a tower's blocks, of which the first part has `first`; 0: there is one part."""
    for i in range(depth(ours, tower)):
        part, number = ("", i) if not first else ("1", i) if i < first else ("2", i - first)
        t, o = f"{theirs}.resblocks{part}.{number}", f"{tower}/block_{i}"
        yield from norm(f"{t}.ln_1", f"{o}/ln1")
        yield from fused(f"{t}.attn.in_proj_weight", f"{t}.attn.in_proj_bias", f"{o}/attn")
        yield from linear(f"{t}.attn.out_proj", f"{o}/attn/out", LINEAR_OUT)
        yield from norm(f"{t}.ln_2", f"{o}/ln2")
        yield from (_leff if f"{o}/mlp/conv/kernel" in ours else _mlp)(f"{t}.mlp", f"{o}/mlp")


def _mlp(theirs, ours):
    yield from linear(f"{theirs}.c_fc", f"{ours}/fc1")
    yield from linear(f"{theirs}.c_proj", f"{ours}/fc2")


def _leff(theirs, ours):
    yield from linear(f"{theirs}.linear1", f"{ours}/fc1")
    yield entry(f"{theirs}.depConv.depconv.weight", f"{ours}/conv/kernel", CONV)
    yield from linear(f"{theirs}.linear2", f"{ours}/fc2")
    for i, name in enumerate(("ac1", "depConv", "ac2"), 1):
        yield from batch_norm(f"{theirs}.{name}.bn", f"{ours.removeprefix('params/')}/bn{i}")


def _vit(ours, parts):
    img = "params/img"
    return [
        entry("visual.conv1.weight", f"{img}/patch/kernel", CONV),
        entry("visual.class_embedding", f"{img}/cls", VECTOR),
        entry("visual.positional_embedding", f"{img}/pos", TABLE),
        *norm("visual.ln_pre", f"{img}/ln_pre"),
        *_blocks("visual.transformer", img, ours, parts[0]),
        *norm("visual.ln_post", f"{img}/ln_post"),
        entry("visual.proj", f"{img}/proj/kernel"),
        entry("visual.proj_pre", f"{img}/regions/kernel"),
    ]


def _text(ours, prefix, parts):
    txt = "params/txt"
    # With a bias the projection is a linear layer, without one it is a bare matrix [in, out].
    projection = (
        linear(f"{prefix}text_projection", f"{txt}/proj")
        if f"{txt}/proj/bias" in ours
        else [entry(f"{prefix}text_projection", f"{txt}/proj/kernel")]
    )
    return [
        entry(f"{prefix}token_embedding.weight", f"{txt}/embed/embedding"),
        entry(f"{prefix}positional_embedding", f"{txt}/pos", TABLE),
        *_blocks(f"{prefix}transformer", txt, ours, parts[1]),
        *norm(f"{prefix}ln_final", f"{txt}/ln_final"),
        *projection,
    ]


def _resnet(ours):
    for i in (1, 2, 3):
        yield from conv_norm(f"visual.conv{i}", f"visual.bn{i}", f"img/stem/conv{i}", f"img/stem/bn{i}")
    yield from bottlenecks(ours, "visual.")
    pool = "params/img/pool"
    yield entry("visual.attnpool.positional_embedding", f"{pool}/pos", TABLE)
    for name, path in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from linear(f"visual.attnpool.{name}_proj", f"{pool}/{path}")
    yield from linear("visual.attnpool.c_proj", f"{pool}/out", LINEAR_OUT)
    yield from norm("visual.attnpool.ln_pre", "params/img/ln_pre")
    yield entry("visual.attnpool.proj_pre", "params/img/regions/kernel")


def _timm(ours):
    trunk, img = "visual.trunk", "params/img"
    yield from timm_vit(ours, f"{trunk}.", img)
    pool, map_ = f"{trunk}.attn_pool", f"{img}/map"
    yield entry(f"{pool}.latent", f"{map_}/probe")
    yield from linear(f"{pool}.q", f"{map_}/attn/query")
    yield from fused(f"{pool}.kv.weight", f"{pool}.kv.bias", f"{map_}/attn", ("key", "value"))
    yield from linear(f"{pool}.proj", f"{map_}/attn/out", LINEAR_OUT)
    yield from norm(f"{pool}.norm", f"{map_}/ln")
    yield from linear(f"{pool}.mlp.fc1", f"{map_}/mlp/fc1")
    yield from linear(f"{pool}.mlp.fc2", f"{map_}/mlp/fc2")
    yield from linear("visual.head.proj", f"{img}/proj")
