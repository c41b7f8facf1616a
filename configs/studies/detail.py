"""Finer semantics: relations and attributes in scenes of two emoji, and the right caption among 1,500.

    python -m clip_jax.study --config=configs/studies/detail.py --workdir=runs/detail

Claims: FILIP's comparison of patches and words, and PyramidCLIP's levels of a picture, tell fine differences that
CLIP's single vector does not.

All rows train on emoji and composed scenes, at 64 pixels, with batches of 128 (configs/clip.py:scenes). PyramidCLIP
knows the boxes of the objects, and its batches are of emoji or of scenes.
"""

from embedded_rows import CONFIGS, METHODS, make_study, unseen

from clip_jax.study import Row

STUDIES = ("",)
SCENES = "scenes?objects=2&concepts=24&pairs=48&told=reading"
VARIANTS = {"CLIP": "clip.py:scenes", "FILIP": "filip.py:scenes", "PyramidCLIP": "pyramidclip.py"}


def get_study(variant=""):
    return make_study(
        "Relations and attributes",
        [Row(method, f"{CONFIGS / config}", tune=METHODS[method][2]) for method, config in VARIANTS.items()],
        "Who tells relations and attributes, and finds a scene's caption among 1,500?",
        "FILIP and PyramidCLIP tell finer differences than CLIP.",
        metrics={
            "caption of 1,500": "scenes/image_to_text_R@1",
            "attributes": "scenes/attributes",
            "objects": "scenes/relations",
            "unseen concepts": unseen("emoji_test", "top1"),
        },
        tasks=("emoji(subset='test')", f"relations(source={SCENES!r})"),
        tune_tasks=(f"relations(source={SCENES!r}, split='val', name='scenes_val', limit=600)",),
        tune_metric="scenes_val/image_to_text_R@1",
        overrides=("data.batch_size=128",),
    )
