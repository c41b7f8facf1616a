"""All methods side by side: their default configurations on the same images at the same compute.

    python -m clip_jax.study --config=configs/studies/methods.py --workdir=runs/methods [--seeds=1]

Each row gets the FLOPs of the first row, CLIP, so a method with several passes in a step gets fewer steps. CLIPPO reads
captions in 28 languages as images, and UniCL has captions for only half of the concepts: they solve another task on the
same images. RA-CLIP uses a tenth of the images as its reference set. PyramidCLIP is missing because it needs regions,
which these images lack.
"""

import pathlib

from clip_jax.study import Row, Study

STUDIES = ("",)
METHODS = "clip siglip flip align clippo oner declip otter zerovl unicl filip laclip alip raclip".split()
CELLS = [(concept, vendor) for concept in ("seen", "unseen") for vendor in ("seen", "unseen")]


def get_study(variant=""):
    folder = pathlib.Path(__file__).parents[1]
    rows = tuple(Row(name, f"{folder / name}.py{':emoji' if name == 'clip' else ''}") for name in METHODS)
    metrics = {f"{c} concept, {v} vendor": f"emoji/{c}_concept_{v}_vendor/top1" for c, v in CELLS}
    return Study("Methods on the embedded images, top-1", rows, metrics, equal_compute=True)
