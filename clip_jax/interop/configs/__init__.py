"""Configurations of third-party formats as configurations of this package, one file a format.

What a format leaves unspecified, and what the weights do not show, is never guessed.
"""

from clip_jax.interop.configs import big_vision, hf, open_clip, pyramidclip

__all__ = ["big_vision", "hf", "open_clip", "pyramidclip"]
