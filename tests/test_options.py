"""Options of every method: each has its section and fields in its configuration, and wrong options are one line."""

import dataclasses
import importlib

import pytest
from conftest import REPO
from helpers import TINY

from clip_jax import config, train
from clip_jax.errors import UserError

METHODS = "alip declip filip laclip oner otter pyramidclip raclip unicl zerovl".split()
#: Overrides that make a configuration small, after `TINY`.
SMALL = {
    "clippo": ["model.image.size=32", "model.image.patch=16"],
    "declip": ["declip.head_width=24", "declip.predictor_width=8", "declip.queue_size=48"],
    "oner": ["oner.head_width=24", "oner.predictor=true", "oner.teacher_augment=()"],
    "pyramidclip": ["model.image.depth=2", "data.source=emoji*1 + scenes?size=32&objects=2*1"],
    "raclip": [
        "data.source=emoji?part=record:!1/10",
        "raclip.reference=emoji?part=record:1/10",
        "raclip.k=4",
        "raclip.heads=2",
    ],
}
#: Texts without an end, for a text tower that does not look for it.
ENDLESS = ["tokenizer=sentencepiece?eot=false", "model.text.pool=last", "model.text.mask_padding=false"]
NO_END = "with eot=false a text may have no end, and the model looks for it"
#: Overrides, and a pattern of the error.
WRONG = {
    "clip": [
        (ENDLESS[:1], NO_END),
        ([*ENDLESS, "model.text.pool=mean"], NO_END),
        ([*ENDLESS, "model.text.mask_padding=true"], NO_END),
    ],
    "align": [(["tokenizer=sentencepiece?eot=false"], NO_END)],
    "alip": [
        (["alip.gamma_pair=-1"], "alip.gamma_pair=-1.0: must be at least 0"),
        (["alip.momentum=2"], "alip.momentum=2.0: must be between 0 and 1"),
        (["alip.synthetic=()"], r"alip.synthetic=\(\): at least one template is needed"),
        (["data.source=emoji"], "emoji: no record has the field 'synthetic' of a template"),
    ],
    "clippo": [
        (["model.image.size=16"], "model.image.size=16: method='clippo' draws texts in rows of 16 pixels"),
        (["model.image.size=40", "model.image.patch=8"], "model.image.size=40"),
        (
            ["tokenizer=sentencepiece"],
            "view 'text' needs a font, tokenizer=unifont, but the tokenizer is sentencepiece",
        ),
        (["tokenizer=unifont:/nowhere.hex"], "cannot read /nowhere.hex"),
        (["tokenizer=unifont?bold=true"], "unknown option 'bold'; allowed: lower, monospace"),
        (["data.source=emoji*3 + text:/nowhere.txt*1"], "/nowhere.txt: no such file"),
    ],
    "declip": [
        (["declip.nn=-1"], "declip.nn=-1.0: must be at least 0"),
        (["declip.queue_size=0"], "declip.queue_size=0: must be at least 1"),
        (["declip.temperature=0"], "declip.temperature=0.0: must be above 0"),
        (["declip.text_mask=1.5"], "declip.text_mask=1.5: must be between 0 and 1"),
        (["declip.word_masks=(0.8, 0.3)"], r"declip.word_masks=\(0.8, 0.3\): two shares are needed"),
        (["declip.logit_scale_clamp=(3,)"], r"declip.logit_scale_clamp=\(3,\): "),
        (["declip.simclr=1", "model.image.token_norm=false"], "declip.simclr needs model.image.token_norm=True"),
        (["model.image.pool=mapp"], "model.image.pool.*'mapp'.*(allowed|did you mean 'map')"),
        (ENDLESS, NO_END),  # for the masked words
    ],
    "filip": [
        (["filip.token_select=top"], "filip.token_select.*'top'.*none, paper25, repo16"),
        (["filip.local_batch=0"], "filip.local_batch=0: must be at least 1"),
        (
            ["filip.token_select=paper25", "filip.local_batch=5"],
            "filip.local_batch=5 does not divide data.batch_size=16",
        ),
        (["filip.use_cls=true"], "filip.use_cls=True needs model.image.cls_token=True"),
        (["model.image.kind=resnet"], "needs model.image.kind='vit', not 'resnet'"),
        (["filip.tokens=3"], "unknown config key 'filip.tokens'"),
        (ENDLESS, NO_END),
    ],
    "laclip": [
        (["data.rewrites=()"], r"data.rewrites=\(\): method='laclip' needs the field"),
        (["data.rewrite_prob=1.5"], r"data.rewrite_prob=1.5: must be between 0 and 1, or -1"),
        (["laclip.mt_t2i=both"], "laclip.mt_t2i.*'both'.*sampled, all"),
        (["laclip.mt_rewrites=-1"], "laclip.mt_rewrites=-1: must be at least 0"),
        (["data.source=emoji"], r"emoji: no record has the field 'rewrites' of data.rewrites.*; fields: concept"),
        (["data.source=emoji?columns=no.jsonl"], "columns=no.jsonl: no such file"),
    ],
    "oner": [
        (["oner.mix=sum"], "oner.mix.*'sum'.*mean, norm_mean"),
        (["oner.cic_kv=both"], "oner.cic_kv.*'both'.*cross, self"),
        (["oner.image_mask=1.5"], "oner.image_mask=1.5: must be between 0 and 1"),
        (["oner.joint_text_mask=0"], "oner.joint_mlm=0.1 has nothing to model with oner.joint_text_mask=0"),
        (["oner.two_heads=true"], "oner.two_heads=True has no head for a mean of both"),
        (["oner.temperature=0"], "oner.temperature=0.0: must be above 0"),
        (["oner.itc=-1"], "oner.itc=-1.0: must be at least 0"),
        (
            ["oner.mim_target=teacher", "oner.teacher_augment=resize,center_crop"],
            "oner.mim_target='teacher' needs oner.teacher_augment",
        ),
        (["oner.embed=predictor", "oner.predictor=false"], "oner.embed='predictor' needs oner.predictor=True"),
        (["model.image.size=20"], "model.image.size=20 is not divisible by the patch size 8"),
        (["model.image.heads=5"], "model.image.width=32 is not divisible by model.image.heads=5"),
        (["model.image.act=gleu"], "model.image.act.*'gleu'.*(allowed|did you mean 'gelu')"),
        (ENDLESS[:1], NO_END),
    ],
    "otter": [
        (["otter.alpha=1.5"], "otter.alpha=1.5: must be between 0 and 1"),
        (["otter.entropy=0"], "otter.entropy=0.0: must be above 0"),
        (["otter.iterations=-1"], "otter.iterations=-1: must be at least 0"),
        (["data.batch_size=1"], "data.batch_size=1: method='otter' compares a pair with others"),
    ],
    "pyramidclip": [
        (["pyramidclip.softening=1"], "pyramidclip.softening=1.0: must be at least 0 and below 1"),
        (["pyramidclip.cross_global=0.96"], "cross_local=0.05.*: must be at least 0, together at most 1"),
        (["pyramidclip.regions=0"], "pyramidclip.regions=0: must be at least 1"),
        (["pyramidclip.tags=()"], r'pyramidclip.tags=\(\): at least one template is needed, such as "{tags}"'),
        (["model.image.front=2"], "model.image.front=2: must be at least 0 and below model.image.depth=2"),
        (["model.image.region_dim=100"], "regions of pixels have 192 features, and with their box 196, not 100"),
        (["pyramidclip.boxes=boxs"], "no record has the field 'boxs' of the view 'regions' .did you mean 'boxes'"),
        (["pyramidclip.tags={tag}"], "no record has the field 'tag' of a template .did you mean 'tags'"),
        (
            ["pyramidclip.features=boxes"],
            r"regions: the field 'boxes' holds an array \[2, 4\], but \[regions, 192\] is needed",
        ),
    ],
    "raclip": [
        (["raclip.k=0"], "raclip.k=0: must be at least 1"),
        (["raclip.retrieval=on"], "raclip.retrieval.*'on'.*(online, cached|did you mean 'online')"),
        (["raclip.out_init=ones"], "raclip.out_init.*'ones'.*(xavier, zeros|did you mean 'zeros')"),
        (["raclip.heads=3"], "model.embed_dim=16 is not divisible by raclip.heads=3"),
        (["raclip.encoder=/nowhere"], "there is no checkpoint: '/nowhere' is no folder"),
        (["raclip.reference="], "raclip.reference is empty: name the held-out pairs"),
        (["raclip.k=4000"], r"raclip.k=4000, but raclip.reference='emoji\?part=record:1/10' has \d+ records"),
        (["raclip.reference=emoji?part=record:2/5"], r"overlap: record \d+ of the one is record \d+ of the other"),
    ],
    "unicl": [(["unicl.class_templates=()"], r"unicl.class_templates=\(\): at least one is needed")],
    "zerovl": [
        (["zerovl.mix_group=3"], "zerovl.mix_group=3 does not divide data.batch_size=16"),
        (["zerovl.mix_images=1.5"], "zerovl.mix_images=1.5: must be between 0 and 1"),
        (["zerovl.mix_alpha=-1"], "zerovl.mix_alpha=-1.0: must be at least 0"),
        (["zerovl.temperature=-1"], "zerovl.temperature=-1.0: must be at least 0"),
        (["zerovl.text_augment=token(0.2)"], "augment: unknown operation 'token'.*did you mean 'tokens'"),
        (["zerovl.text_augment=tokens(2)"], r"augment: tokens\(2, 0.5, 0.1\): shares are between 0 and 1"),
        (
            ["tokenizer=clip_bpe"],
            "augment: tokens masks words, but the tokenizer 'clip_bpe' has no mask token: give mask=0",
        ),
    ],
}


def load(name, *overrides):
    """The small configuration of a method."""
    other = {"clippo": "model.text", "oner": "model.text", "align": "model.image"}.get(name, "none")
    tiny = [override for override in TINY if not override.startswith(other)]
    return config.load(str(REPO / "configs" / f"{name}.py"), [*tiny, *SMALL.get(name, ()), *overrides])


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        pytest.param(name, overrides, message, id=f"{name}-{' '.join(overrides)}")
        for name, cases in WRONG.items()
        for overrides, message in cases
    ],
)
def test_wrong_options_are_one_line(name, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        train.make_parts(load(name, *overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, overrides", [("clip", ENDLESS), ("declip", [*ENDLESS, "declip.mlm=0"])])
def test_texts_need_no_end_where_nothing_looks_for_it(name, overrides):
    assert train.make_parts(load(name, *overrides))[0].tokenizer == "sentencepiece?eot=false"


@pytest.mark.parametrize("name", METHODS)
def test_a_field_that_a_method_does_not_have(name):
    c = load(name).unlock()
    c[name].nonsense = 1
    with pytest.raises(UserError, match=f"{name}.nonsense is no field of method='{name}'"):
        train.make_parts(c)


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_holds_every_option(name):
    options = importlib.import_module(f"clip_jax.methods.{name}").Options
    assert set(config.load(str(REPO / "configs" / f"{name}.py"))[name]) == {f.name for f in dataclasses.fields(options)}


@pytest.mark.parametrize(
    "spec, nearest",
    [
        ("align.py:b77", "b7"),
        ("alip.py:b33", "b32"),
        ("clippo.py:b166", "b16"),
        ("declip.py:small_slp", "small_slip"),
        ("filip.py:b32_yfc", "b32_yfcc"),
        ("flip.py:b16_tun", "b16_tune"),
        ("laclip.py:cc12", "cc12m"),
        ("lit.py:b166", "b16"),
        ("oner.py:itc_xcm", "itc_xmc"),
        ("otter.py:smal_kd", "small_kd"),
        ("pyramidclip.py:rn5", "rn50"),
        ("raclip.py:b33", "b32"),
        ("siglip.py:b16_244", "b16_224"),
        ("unicl.py:label", "labels"),
        ("zerovl.py:b16_102", "b16_1024"),
    ],
)
def test_an_unknown_variant_names_the_nearest(spec, nearest):
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        config.load(str(REPO / "configs" / spec))
