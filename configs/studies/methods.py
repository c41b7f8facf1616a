"""The methods beside each other: their default configurations, on the same pictures with the same compute.

    python -m clip_jax.study --config=configs/studies/methods.py --workdir=runs/methods [--seeds=1]

Every row has the FLOPs of the first one, CLIP's, so that a method with several passes in a step gets fewer steps. CLIPPO reads captions in
28 languages as pictures, UniCL has captions of half of the concepts alone: they solve another task with the same pictures. RA-CLIP keeps a
tenth of them to look up. PyramidCLIP is not among them: it needs regions, which these pictures do not have.
"""

import pathlib

from clip_jax.study import Row, Study

STUDIES = ("",)
METHODS = (
    "clip",
    "siglip",
    "flip",
    "align",
    "clippo",
    "oner",
    "declip",
    "otter",
    "zerovl",
    "unicl",
    "filip",
    "laclip",
    "alip",
    "raclip",
)
CELLS = [(concept, vendor) for concept in ("seen", "unseen") for vendor in ("seen", "unseen")]


def get_study(variant=""):
    folder = pathlib.Path(__file__).parents[1]
    rows = tuple(Row(name, f"{folder / name}.py{':emoji' if name == 'clip' else ''}") for name in METHODS)
    metrics = {
        f"{concept} concept, {vendor} vendor": f"emoji/{concept}_concept_{vendor}_vendor/top1"
        for concept, vendor in CELLS
    }
    return Study("Methods on the embedded pictures, top-1", rows, metrics, equal_compute=True)
