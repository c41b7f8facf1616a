"""Data input: sources, decoding, augmentation, views, tokenizers and the loader. Nothing here imports JAX or knows a method."""
