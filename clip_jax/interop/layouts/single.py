"""The layouts of single towers: Hugging Face's BertModel, and the vision transformers of timm and DINO."""

from clip_jax.interop.layouts import CONV, LINEAR_OUT, depth, entry, fused, linear, norm, present
from clip_jax.interop.layouts.hf import bert_encoder

#: BERT's pooler and heads of its training, and position ids.
BERT_IGNORED = (r"pooler\..*", r"cls\..*", r"embeddings\.position_ids")
#: Classification heads.
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
