"""Data input: sources, decoding, augmentation, views, tokenizers and the loader. Imports neither JAX nor a method."""
