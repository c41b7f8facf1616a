"""Pretraining of CLIP-like models in JAX: one trainer, many methods, any machine.

`clip_jax.load(folder)` returns a trained model; see `clip_jax.inference.Model`.
"""

from clip_jax.version import __version__

__all__ = ["Model", "__version__", "load"]


def __getattr__(name):
    # Importing JAX takes seconds, so `import clip_jax` alone does not import it.
    if name in ("Model", "load"):
        from clip_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
