"""Recognizes the format of a single tower by the names of its tensors."""

import functools
import re

from clip_jax import weight_files
from clip_jax.interop.layouts import towers as layouts
from clip_jax.interop.towers import configs
from clip_jax.interop.towers.files import Foreign, read_json, weights

#: What `recognize` knows, for messages.
KNOWN = (
    "Hugging Face (BertModel, MPNetModel, ViTModel, Dinov2Model), timm or DINO (patch_embed.*), torchvision (layer1.*)"
)


def recognize(path, heads=None):
    """Returns the `Foreign` tower of a file or folder, or None when it is no single tower of a known format.

    Args:
      path: a weight file or a folder. A configuration file in the same folder is read too.
      heads: heads of a vision transformer, where its files do not show them.

    Raises UserError when the file is damaged or contradicts its configuration.
    """
    file = weights(path)
    return of_tensors(file, weight_files.read(file), heads)


def of_tensors(file, tensors, heads=None):
    """As `recognize`, for the tensors `{name: Tensor}` of a file."""
    cfg = read_json(file.parent / "config.json") or {}
    tensors = {re.sub(r"^(bert|mpnet|vit|dinov2|dinov2_with_registers)\.", "", name): t for name, t in tensors.items()}
    if "embeddings.word_embeddings.weight" in tensors:
        return _text(file, tensors, cfg)
    if "embeddings.patch_embeddings.projection.weight" in tensors:
        config = configs.hf_vit(tensors, cfg, read_json(file.parent / "preprocessor_config.json") or {})
        dino = "encoder.layer.0.norm1.weight" in tensors
        kind, entries = "Dinov2Model" if dino else "ViTModel", functools.partial(layouts.hf_vit, dino=dino)
        resize = "antialias" if config.model.image.registers else "torch"
        return Foreign(f"Hugging Face {kind}", file, tensors, config, entries, layouts.HF_IGNORED, resize=resize)
    if {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= tensors.keys():
        config = configs.timm_vit(tensors, cfg, heads)
        # timm's own file of a DINOv2 tower has neither a mask token nor registers of this name.
        dino = "mask_token" in tensors or "register_tokens" in tensors
        resize = "dinov2" if dino and not config.model.image.registers else "antialias"
        entries = functools.partial(layouts.timm_vit, cls_position=configs.has_cls_position(tensors), dino=dino)
        return Foreign(
            "DINOv2" if dino else "timm", file, tensors, config, entries, layouts.TIMM_IGNORED, resize=resize
        )
    if {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight"} <= tensors.keys():
        config = configs.resnet(tensors, cfg)
        return Foreign("ResNet", file, tensors, config, layouts.resnet, layouts.RESNET_IGNORED)
    return None


def _text(file, tensors, cfg):
    # The first files have TensorFlow's names of the norms. The heads of the training stand beside the encoder.
    renamed = {"gamma": "weight", "beta": "bias"}
    tensors = {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: renamed[m[1]], name): t for name, t in tensors.items()
    }
    if "encoder.relative_attention_bias.weight" in tensors:
        config = configs.mpnet(tensors, cfg)
        return Foreign("Hugging Face MPNetModel", file, tensors, config, layouts.mpnet, layouts.BERT_IGNORED)
    config = configs.bert(tensors, cfg)
    return Foreign("Hugging Face BertModel", file, tensors, config, layouts.bert, layouts.BERT_IGNORED)
