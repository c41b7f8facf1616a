"""More and noisier data: emoji, with clip art, with noisy clip art, with scenes. Does it help?

    python -m clip_jax.study --config=configs/studies/scale.py --workdir=runs/scale

Claim of ALIGN: a larger number of noisy pairs, filtered by simple rules alone, is better than fewer clean ones.

Steps do not depend on the amount of data. Three of four examples are emoji, or of five with scenes. "clip art" is that
with keywords, which its captions name; "noisy clip art" is all of it, with its titles as captions. No clip art names an
unseen concept. ALIGN's recipe is its loss, towers and optimizer. Filtered rows have the noisy clip art that passes
ALIGN's rules. Values are tried on emoji. Rows of ALIGN's recipe are compared with that on emoji, and this with CLIP's.
"""

from embedded_rows import ALIGN_FILTER, TEMPLATES, make_row, make_study

STUDIES = ("",)
NOISY = "openclipart?without=emoji"
SOURCES = {
    "emoji": "emoji",
    "clip art": f"emoji*3 + {NOISY}&has=keywords*1",
    "noisy clip art": f"emoji*3 + {NOISY}{{index}}*1",
    "noisy clip art and scenes": f"emoji*3 + {NOISY}{{index}}*1 + scenes?objects=2*1",
}
CAPTIONS = {"emoji": (), "clip art": ("{caption}, {keywords}",)}
FILTER = (*ALIGN_FILTER, f"--source={NOISY}")


def get_study(variant=""):
    return make_study(
        "More and noisier data",
        [row for method in ("CLIP", "ALIGN") for data in SOURCES for row in rows(method, data)],
        "Does more and noisier data help, and do filters?",
        "ALIGN: scale makes up for noise, and simple filters are enough.",
    )


def rows(method, data):
    """Yields the rows of a method on one kind of data, without and with the filter where it has noise."""
    templates = TEMPLATES + CAPTIONS.get(data, ("{caption}",))
    for is_filtered in (False, True) if "noisy" in data else (False,):
        name = f"{method}, {data}{', filtered' * is_filtered}"
        source = SOURCES[data] if is_filtered else SOURCES[data].replace("{index}", "")
        overrides = (f"data.source={source}", f"data.templates={templates!r}")
        tuned = {} if data == "emoji" else dict.fromkeys(("tuned_as", "minus"), f"{method}, emoji")
        yield make_row(method, name, overrides, index=FILTER if is_filtered else (), line="", **tuned)
