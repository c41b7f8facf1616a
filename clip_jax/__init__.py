"""Pretraining of CLIP-like models in JAX: one trainer, many methods, any machine.

`clip_jax.load(folder)` gives a trained model ready for use; see `clip_jax.inference.Model`.
"""

from clip_jax.version import __version__  # noqa: F401


def __getattr__(name):
    # Loading JAX takes seconds, so `import clip_jax` alone does not.
    if name in ("Model", "load"):
        from clip_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
