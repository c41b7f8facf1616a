"""The layouts of Hugging Face transformers: CLIPModel, SiglipModel and AlignModel."""

import re

from clip_jax.interop.layouts import (
    CONV,
    LINEAR_OUT,
    TABLE,
    VECTOR,
    Op,
    batch_norm,
    depth,
    entry,
    fused,
    linear,
    norm,
    present,
)

#: Buffers, counters of batch norms, and BERT's pooler, which AlignModel's embedding does not use.
IGNORED = (r".*\.(position|token_type)_ids", r".*\.num_batches_tracked", r"text_model\.pooler\..*")

DENSE_AS_CONV = Op(lambda s: (1, 1, *s), CONV.axes)


def clip_entries(ours):
    """Returns the layout of CLIPModel for our parameters, `{path: ...}`."""
    return present(
        [
            *_towers(ours),
            entry("vision_model.embeddings.class_embedding", "params/img/cls", VECTOR),
            *norm("vision_model.pre_layrnorm", "params/img/ln_pre"),
            *linear("visual_projection", "params/img/proj"),
            *linear("text_projection", "params/txt/proj"),
            entry("logit_scale", "params/logit_scale"),
        ],
        ours,
    )


def siglip_entries(ours):
    """Returns the layout of SiglipModel for our parameters, `{path: ...}`."""
    head, pool = "vision_model.head", "params/img/map"
    return present(
        [
            *_towers(ours),
            entry(f"{head}.probe", f"{pool}/probe"),
            *fused(f"{head}.attention.in_proj_weight", f"{head}.attention.in_proj_bias", f"{pool}/attn"),
            *linear(f"{head}.attention.out_proj", f"{pool}/attn/out", LINEAR_OUT),
            *norm(f"{head}.layernorm", f"{pool}/ln"),
            *linear(f"{head}.mlp.fc1", f"{pool}/mlp/fc1"),
            *linear(f"{head}.mlp.fc2", f"{pool}/mlp/fc2"),
            *linear("text_model.head", "params/txt/proj"),
            entry("logit_scale", "params/logit_scale", VECTOR),
            entry("logit_bias", "params/logit_bias", VECTOR),
        ],
        ours,
    )


def align_entries(ours):
    """Returns the layout of AlignModel for our parameters, `{path: ...}`."""
    return present(
        [
            *_efficientnet(ours),
            *bert_encoder(ours, "text_model."),
            *linear("text_projection", "params/txt/proj"),
            entry("temperature", "params/temperature"),
        ],
        ours,
    )


def _efficientnet(ours):
    stem = "vision_model.embeddings"
    yield entry(f"{stem}.convolution.weight", "params/img/stem_conv/kernel", CONV)
    yield from batch_norm(f"{stem}.batchnorm", "img/stem_bn")
    for i in range(len({m[1] for path in ours if (m := re.match(r"params/img/mbconv_(\d+)/", path))})):
        t, o = f"vision_model.encoder.blocks.{i}", f"img/mbconv_{i}"
        for part, conv, bn, path in (
            ("expansion", "expand_conv", "expand_bn", "expand"),
            ("depthwise_conv", "depthwise_conv", "depthwise_norm", "depthwise"),
            ("projection", "project_conv", "project_bn", "project"),
        ):
            yield entry(f"{t}.{part}.{conv}.weight", f"params/{o}/{path}_conv/kernel", CONV)
            yield from batch_norm(f"{t}.{part}.{bn}", f"{o}/{path}_bn")
        for name in ("reduce", "expand"):
            yield from linear(f"{t}.squeeze_excite.{name}", f"params/{o}/se_{name}", DENSE_AS_CONV)


def bert_encoder(ours, prefix):
    """Yields the entries of BERT's encoder, whose names begin with `prefix`."""
    bert, embeddings = "params/txt/bert", f"{prefix}embeddings"
    for name, path in (("word", "embed/embedding"), ("token_type", "type")):
        yield entry(f"{embeddings}.{name}_embeddings.weight", f"{bert}/{path}")
    yield entry(f"{embeddings}.position_embeddings.weight", f"{bert}/pos", TABLE)
    yield from norm(f"{embeddings}.LayerNorm", f"{bert}/ln_embed")
    for i in range(depth(ours, bert)):
        t, o = f"{prefix}encoder.layer.{i}", f"{bert}/block_{i}"
        for name in ("query", "key", "value"):
            yield from linear(f"{t}.attention.self.{name}", f"{o}/attn/{name}")
        yield from linear(f"{t}.attention.output.dense", f"{o}/attn/out", LINEAR_OUT)
        yield from norm(f"{t}.attention.output.LayerNorm", f"{o}/ln1")
        yield from linear(f"{t}.intermediate.dense", f"{o}/mlp/fc1")
        yield from linear(f"{t}.output.dense", f"{o}/mlp/fc2")
        yield from norm(f"{t}.output.LayerNorm", f"{o}/ln2")


def _towers(ours):
    """Returns the entries that CLIPModel and SiglipModel share."""
    img, txt = "params/img", "params/txt"
    return [
        entry("vision_model.embeddings.patch_embedding.weight", f"{img}/patch/kernel", CONV),
        entry("vision_model.embeddings.patch_embedding.bias", f"{img}/patch/bias"),
        entry("vision_model.embeddings.position_embedding.weight", f"{img}/pos", TABLE),
        *_blocks("vision_model", img, depth(ours, img)),
        *norm("vision_model.post_layernorm", f"{img}/ln_post"),
        entry("text_model.embeddings.token_embedding.weight", f"{txt}/embed/embedding"),
        entry("text_model.embeddings.position_embedding.weight", f"{txt}/pos", TABLE),
        *_blocks("text_model", txt, depth(ours, txt)),
        *norm("text_model.final_layer_norm", f"{txt}/ln_final"),
    ]


def _blocks(theirs, ours, count):
    for i in range(count):
        t, o = f"{theirs}.encoder.layers.{i}", f"{ours}/block_{i}"
        yield from norm(f"{t}.layer_norm1", f"{o}/ln1")
        for name, path in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from linear(f"{t}.self_attn.{name}_proj", f"{o}/attn/{path}")
        yield from linear(f"{t}.self_attn.out_proj", f"{o}/attn/out", LINEAR_OUT)
        yield from norm(f"{t}.layer_norm2", f"{o}/ln2")
        yield from linear(f"{t}.mlp.fc1", f"{o}/mlp/fc1")
        yield from linear(f"{t}.mlp.fc2", f"{o}/mlp/fc2")
