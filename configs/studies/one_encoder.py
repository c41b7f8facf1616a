"""One tower for pictures and texts, in 28 languages.

    python -m clip_jax.study --config=configs/studies/one_encoder.py --workdir=runs/one_encoder

Claims of CLIPPO: one tower that reads texts as pictures comes near CLIP, needs no tokenizer, and is good with many
languages; pairs of texts help its understanding of language.

Captions are names in 28 languages, most of them English and Korean (configs/clippo.py). CLIP reads them by
SentencePiece. The pairs of texts are the names of one thing in two languages (configs/studies/translations.py), where
the paper has neighbouring sentences. The rows of OneR are a study of their own: configs/oner.py:ablation.
"""

from embedded_rows import CONFIGS, LR, METHODS, make_study, unseen

from clip_jax import config
from clip_jax.study import Row

STUDIES = ("",)


def get_study(variant=""):
    clippo, tune = f"{CONFIGS / 'clippo.py'}", METHODS["CLIPPO"][2]
    languages = f"data.templates={tuple(config.load(clippo).data.templates)!r}"
    rows = (
        Row("CLIP, SentencePiece", f"{CONFIGS / 'clip.py:emoji'}", (languages,), tune=LR),
        Row("CLIPPO", clippo, tune=tune),
        Row("CLIPPO, a quarter text pairs", clippo, ("data.source=emoji*3 + studies.translations*1",), tune=tune),
    )
    languages_of_tests = {"English": "emoji_test", "Korean": "emoji_test_ko"}
    return make_study(
        "One tower for both",
        rows,
        "What does one tower for pictures and texts reach in 28 languages?",
        "CLIPPO comes near CLIP without a tokenizer; pairs of texts help.",
        metrics={f"unseen concepts, {name}": unseen(prefix) for name, prefix in languages_of_tests.items()},
        tasks=("emoji(subset='test')", "emoji(subset='test', language='ko')"),
        tune_tasks=("emoji(subset='val')",),
        overrides=("data.batch_size=256",),
    )
