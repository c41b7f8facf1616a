"""Runs CLIP_benchmark with the additional model type `clip_jax`, which loads this package's checkpoints.

    python -m clip_jax.tools.clip_benchmark eval --model=runs/clip --dataset=cifar10 --output=result.json

`--model` is anything that `clip_jax.load` takes. `--pretrained` selects the checkpoint: latest (the default), best or a
step. All other arguments are CLIP_benchmark's. Only this command needs PyTorch and `pip install clip_benchmark`. JAX
computes the embeddings on its own devices; images and texts are prepared as the checkpoint specifies.
"""

import sys

import numpy as np

from clip_jax import inference
from clip_jax.errors import UserError
from clip_jax.methods.interface import Method
from clip_jax.runtime import command

MODEL_TYPE = "clip_jax"


class Transform:
    """Makes an image a uint8 tensor `[size, size, 3]`; the model normalises it."""

    def __init__(self, view):
        self.view = view

    def __call__(self, image):
        import torch

        return torch.from_numpy(self.view({"image": image}, None).copy())


class TorchModel:
    """A `clip_jax.inference.Model` that takes and returns PyTorch tensors."""

    def __init__(self, model):
        import jax

        self.model = model
        self._text = jax.jit(model.method.embed_text)

    def eval(self):
        return self

    def encode_image(self, images):
        """Returns unit rows float32 `[n, E]` for images uint8 `[n, size, size, 3]`."""
        return self._tensor(self.model.embed_image(images.cpu().numpy()), images)

    def encode_text(self, ids):
        """Returns unit rows float32 `[n, E]` for the output of the tokenizer."""
        return self._tensor(np.asarray(self._text(self.model.params, self.model.extra, ids.cpu().numpy())), ids)

    @staticmethod
    def _tensor(array, like):
        import torch

        return torch.from_numpy(array.copy()).to(like.device)


def load_clip_jax(model_name, pretrained="latest", cache_dir=None, device="cpu"):
    """Returns `(model, transform, tokenizer)` as CLIP_benchmark expects them.

    Args:
      model_name: path of a checkpoint or of third-party weights.
      pretrained: latest, best or a step.
      cache_dir, device: unused; nothing is downloaded, and JAX has its own devices.

    Raises UserError when the model cannot be loaded, has no tokenizer, or has a similarity other than a dot product.
    """
    import torch

    model = inference.load(model_name, pretrained)
    if model.tokenizer is None:
        raise UserError(
            f"{model_name!r} has no tokenizer: import it by python -m clip_jax.interop.load --tokenizer=..."
        )
    if model.method.similarity is not Method.similarity:
        raise UserError(
            f"method={model.config.method!r}: CLIP_benchmark compares by dot products, this method does not"
        )
    return (
        TorchModel(model),
        Transform(model.image_view),
        lambda texts: torch.from_numpy(model.token_ids(texts)),
    )


def main(argv=None):
    """Runs CLIP_benchmark's command with `clip_jax` as the default model type; returns the exit status."""
    return command.run(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        raise UserError(f"CLIP_benchmark cannot be imported ({error}): pip install clip_benchmark") from None
    models.TYPE2FUNC[MODEL_TYPE] = load_clip_jax
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    if argv[:1] == ["eval"]:
        for option, value in (("--model_type", MODEL_TYPE), ("--pretrained", "latest")):
            if not any(argument.split("=")[0] == option for argument in argv):
                argv = [*argv, option, value]
    sys.argv = ["clip_benchmark", *argv]
    cli.main()


if __name__ == "__main__":
    command.script(main)
