"""Tokenizers, and the font that replaces a tokenizer in CLIPPO."""

from clip_jax.data.tokenizers.base import TextInput, Tokenizer
from clip_jax.data.tokenizers.make import make_tokenizer

__all__ = ["TextInput", "Tokenizer", "make_tokenizer"]
