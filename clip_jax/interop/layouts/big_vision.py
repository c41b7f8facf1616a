"""The layout of big_vision's .npz: SigLIP (two towers), CLIPPO (one tower), LiT's image tower and plain image towers.

big_vision uses Flax too, so the arrays are the same.
"""

from clip_jax.interop.layouts import KEEP, VECTOR, WithoutFirst, depth, entry, present


def entries(ours, bare=False, stacked=False, cls_position=False):
    """Returns the layout.

    Args:
      ours: `{path: ...}` of our parameters.
      bare: whether the file holds an image tower alone, without the prefix `img/`.
      stacked: whether the layers are stacked in `encoderblock` (big_vision's `scan=True`).
      cls_position: whether the class token has a position embedding, the first row, as in old files.
    """
    img, txt = "params/img", "params/txt"
    image = "" if bare else "img/"
    positions = KEEP if cls_position or f"{img}/cls" not in ours else WithoutFirst()
    found = [
        *_leaves(f"{image}embedding", f"{img}/patch", ("kernel", "bias")),
        entry(f"{image}pos_embedding", f"{img}/pos", positions),
        entry(f"{image}cls", f"{img}/cls"),
        *_encoder(f"{image}Transformer", img, "ln_post", depth(ours, img), stacked),
        entry(f"{image}MAPHead_0/probe", f"{img}/map/probe"),
        *_leaves(f"{image}MAPHead_0/LayerNorm_0", f"{img}/map/ln", ("scale", "bias")),
        *_attention(f"{image}MAPHead_0", f"{img}/map"),
        *_mlp(f"{image}MAPHead_0", f"{img}/map"),
        *_leaves(f"{image}head", f"{img}/proj", ("kernel", "bias")),
        entry("txt/Embed_0/embedding", f"{txt}/embed/embedding"),
        entry("txt/pos_embedding", f"{txt}/pos"),
        *_encoder("txt/Encoder_0", txt, "ln_final", depth(ours, txt), stacked),
        *_leaves("txt/head", f"{txt}/proj", ("kernel", "bias")),
        entry("t", "params/logit_scale", VECTOR),
        entry("b", "params/logit_bias", VECTOR),
    ]
    return present(found, ours)


def _leaves(theirs, ours, names):
    return [entry(f"{theirs}/{name}", f"{ours}/{name}") for name in names]


def _attention(theirs, ours):
    theirs = f"{theirs}/MultiHeadDotProductAttention_0"
    return [
        e
        for name in ("query", "key", "value", "out")
        for e in _leaves(f"{theirs}/{name}", f"{ours}/attn/{name}", ("kernel", "bias"))
    ]


def _mlp(theirs, ours):
    return [
        e
        for i in (0, 1)
        for e in _leaves(f"{theirs}/MlpBlock_0/Dense_{i}", f"{ours}/mlp/fc{i + 1}", ("kernel", "bias"))
    ]


def _encoder(theirs, ours, last_norm, count, stacked):
    def block(theirs, ours):
        norms = [e for i in (0, 1) for e in _leaves(f"{theirs}/LayerNorm_{i}", f"{ours}/ln{i + 1}", ("scale", "bias"))]
        return [*norms, *_attention(theirs, ours), *_mlp(theirs, ours)]

    yield from _leaves(f"{theirs}/encoder_norm", f"{ours}/{last_norm}", ("scale", "bias"))
    if not stacked:
        for i in range(count):
            yield from block(f"{theirs}/encoderblock_{i}", f"{ours}/block_{i}")
    elif count:
        for e in block(f"{theirs}/encoderblock", f"{ours}/block_#"):
            yield entry(e.theirs, [e.ours[0].replace("#", str(i)) for i in range(count)], stack=True)
