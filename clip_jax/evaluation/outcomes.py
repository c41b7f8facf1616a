"""The outcomes of an evaluation image by image, in a file, so that two models can be compared on the same images."""

import io

import numpy as np

from clip_jax.data.files import NPZ_ERRORS
from clip_jax.evaluation.results import Outcomes
from clip_jax.runtime import storage

#: The file of a work folder with the outcomes of its last evaluation.
FILE = "outcomes.npz"
_STEP = "step"


def write(path, step, outcomes):
    """Writes outcomes as a .npz file, atomically.

    Args:
      path: the file.
      step: the training step of the model.
      outcomes: metric -> `Outcomes`; without any, nothing is written.

    Raises OSError, or StorageError for a bucket.
    """
    if not outcomes:
        return
    arrays = {_STEP: np.int64(step)}
    for name, found in outcomes.items():
        arrays |= {f"{name}/values": found.values, f"{name}/groups": found.groups}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    storage.write(path, buffer.getvalue())


def read(path, step):
    """Returns metric -> `Outcomes` of a file; {} when there is none, when it is damaged, or of another step.

    Args:
      path: the file.
      step: the training step that is asked for.
    """
    try:
        with (
            storage.guard(path),
            path.open("rb") as file,
            np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays,
        ):
            if int(arrays[_STEP]) != step:
                return {}
            names = [key.removesuffix("/values") for key in arrays if key.endswith("/values")]
            return {name: Outcomes(arrays[f"{name}/values"], arrays[f"{name}/groups"]) for name in names}
    except NPZ_ERRORS:
        return {}
