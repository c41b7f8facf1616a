"""Debiased sampling (ZeroVL's oracle e), selections of a source by a field, labels of mixtures."""

import pickle

import grain
import numpy as np
import pytest
from data_helpers import Bytes, assert_equal, concatenate, loader, records, take, write_table
from helpers import tiny_config

from clip_jax import train
from clip_jax.data.loader import check_source
from clip_jax.data.order import Mixed, Order
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.views import TextView
from clip_jax.errors import UserError

SIZES = (60, 30, 10)
STARTS = [0, 60, 90, 100]
TEXT = [TextView("text", 8)]


def mixture(weights=SIZES):
    return MixtureSource([MemorySource(records(n), f"source{i}") for i, n in enumerate(SIZES)], weights)


def debiased(source, views=TEXT, **arguments):
    return loader(source, views, **(dict(one_source=True, batch_size=10) | arguments))


# The order


@pytest.fixture(scope="module")
def parts():
    """The part of each of 10,240 steps, by seed."""
    orders = {seed: Order(STARTS, SIZES, seed, 10, True) for seed in (0, 1)}
    return {seed: np.array([order.rows(t, 0, 1)[0].part for t in range(10_240)]) for seed, order in orders.items()}


def test_oracle_e_sources_are_drawn_by_size(parts):
    share = np.array(SIZES) / 100
    for chosen in parts.values():
        counts = np.bincount(chosen, minlength=3)
        assert (
            (counts - share * len(chosen)) ** 2 / (share * len(chosen))
        ).sum() < 9.2  # the 99 % quantile of chi-square with 2 degrees
        for block in chosen.reshape(-1, 256):
            np.testing.assert_allclose(np.bincount(block, minlength=3), 256 * share, atol=2)


def test_the_order_of_sources_is_random(parts):
    for chosen in parts.values():
        for shift in (1, 2, 5, 256):
            same = (chosen[shift:] == chosen[:-shift]).mean()
            assert abs(same - 0.46) < 0.03, "0.6² + 0.3² + 0.1²"
    assert (parts[0] != parts[1]).mean() > 0.4


def test_each_source_goes_through_its_epochs_in_order():
    order = Order(STARTS, SIZES, 0, 10, True)
    rows = [draw[:3] for step in range(600) for draw in order.rows(step, 0, 10)]
    for part, size in enumerate(SIZES):
        epochs = [epoch for p, epoch, _ in rows if p == part]
        assert epochs == sorted(epochs)
        ids = [example_id for p, _, example_id in rows if p == part]
        for k in range(len(ids) // size):
            assert sorted(ids[k * size : (k + 1) * size]) == list(range(STARTS[part], STARTS[part + 1]))


@pytest.mark.parametrize("weights", [[3, 1.5, 1], [1, 1e8], [1e-20, 1]])
def test_parts_are_mixed_by_grains_rule(weights):
    mixed, positions = Mixed(weights), np.concatenate([np.arange(40), 10**12 + np.arange(40)])
    parts, numbers = mixed.draws(positions)
    for part in range(len(weights)):
        before = [mixed.before(int(i))[part] for i in positions[parts == part]]
        assert numbers[parts == part].tolist() == before
    if sum(weights) / min(weights) < 1e9:  # more is too much for Grain
        sources = [grain.MapDataset.range(2**40).map(lambda i, p=p: (p, i)) for p in range(len(weights))]
        expected = grain.MapDataset.mix(sources, weights)
        assert [expected[int(i)] for i in positions] == list(zip(parts.tolist(), numbers.tolist(), strict=True))


def test_mixed_sampling_is_what_it_was():
    order = Order(STARTS, SIZES, 0, 10, False)
    assert np.bincount([draw.part for step in range(10) for draw in order.rows(step, 0, 10)]).tolist() == list(SIZES)


# Batches


def test_oracle_e_every_batch_has_one_source_and_all_hosts_agree():
    batches = take(debiased(mixture()), 40)
    sources = [set(batch["source_id"].tolist()) for batch in batches]
    assert all(len(found) == 1 for found in sources) and set().union(*sources) == {0, 1, 2}
    for batch in batches:
        ids = batch["example_id"]
        np.testing.assert_array_equal(np.searchsorted(STARTS, ids, "right") - 1, batch["source_id"])
    assert_equal(concatenate([take(debiased(mixture(), host=host, hosts=5), 40) for host in range(5)]), batches)


@pytest.mark.parametrize("start", [1, 7, 300])
def test_resume_at_any_step(start):
    batches = take(debiased(mixture()), start + 3)
    assert_equal(take(debiased(mixture(), start_step=start), 3), batches[start:])


def test_resume_far_away_costs_nothing():
    assert len(next(debiased(mixture(), start_step=10**12, threads=0))["example_id"]) == 10


def test_worker_processes_change_nothing():
    with_workers = debiased(mixture(), workers=1)
    assert_equal(take(with_workers, 5), take(debiased(mixture()), 5))
    with_workers.close()


@pytest.mark.parametrize(
    "source", [MemorySource(records(12)), MixtureSource([MemorySource(records(12))], [1.0])], ids=["alone", "mixture"]
)
def test_a_mixture_of_one_is_its_source(source):
    assert_equal(take(debiased(source), 5), take(loader(source, TEXT, batch_size=10), 5))


def test_a_bad_record_is_replaced_by_one_of_its_source():
    bad = [{"texts": [""]}] * 15
    source = MixtureSource([MemorySource(records(15) + bad), MemorySource(records(15) + bad)], [1, 1])
    for batch in take(debiased(source, max_bad_share=0.9), 10):
        assert len(set(batch["source_id"].tolist())) == 1 and (batch["example_id"] % 30 < 15).all()


def test_a_source_smaller_than_a_batch():
    message = "data.sampling='one_source': source2 has 10 records, fewer than a batch, data.batch_size=11"
    with pytest.raises(UserError, match=message):
        debiased(mixture(), batch_size=11)
    with pytest.raises(UserError, match=message):
        check_source(mixture(), TEXT, Bytes(), 11, one_source=True)
    check_source(mixture(), TEXT, Bytes(), 10, one_source=True)
    check_source(mixture(), TEXT, Bytes(), 11)


def test_the_command_line_answers_before_a_device_is_touched(tmp_path):
    table = write_table(tmp_path, [{"caption": "a", "vendor": "ab"[i > 0]} for i in range(20)])
    for overrides, message in (
        (
            [f"data.source={table}?by=vendor", "data.sampling=one_source"],
            "vendor:a has 1 records, fewer than a batch, data.batch_size=16",
        ),
        (["data.sampling=one-source"], r"data.sampling 'one-source' \(did you mean 'one_source'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            train.make_parts(tiny_config("data.templates=()", *overrides))
        assert "\n" not in str(error.value)


# Selections


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rows = [{"caption": f"c{i}", "vendor": f"v{i % 3}", "concept": i // 3, "kind": f"k_{i % 2}"} for i in range(60)]
    del rows[5]["vendor"], rows[7]["kind"]
    return write_table(tmp_path_factory.mktemp("table"), rows)


def captions(source):
    return [source[i]["texts"][0] for i in range(len(source))]


def test_records_with_a_value(table):
    source = make_source(f"{table}?where=vendor:v2")
    assert captions(source) == [f"c{i}" for i in range(2, 60, 3) if i != 5] and source.class_names is None
    assert source.name.endswith("?where=vendor:v2") and captions(pickle.loads(pickle.dumps(source))) == captions(source)
    assert captions(make_source(f"{table}?where=vendor:v2&where=vendor:v2")) == captions(source)


def test_parts_hold_all_records_of_a_value_and_nothing_twice(table):
    halves = [captions(make_source(f"{table}?part=concept:{i}/2")) for i in (1, 2)]
    assert sorted(halves[0] + halves[1]) == sorted(f"c{i}" for i in range(60))
    concepts = [{int(c[1:]) // 3 for c in half} for half in halves]
    assert not concepts[0] & concepts[1] and min(map(len, concepts)) >= 5
    assert len(make_source(f"{table}?part=concept:1/1")) == 60


def test_a_field_as_label(table):
    source = make_source(f"{table}?where=vendor:v1&label=kind")
    assert source.class_names == ["k_0", "k_1"]
    found = {source[i]["texts"][0]: (source[i].get("label"), source[i].get("class_name")) for i in range(len(source))}
    assert found["c4"] == (0, "k 0") and found["c1"] == (1, "k 1") and found["c7"] == (None, None)


def test_one_source_for_each_value(table):
    source = make_source(f"{table}?by=vendor")
    assert isinstance(source, MixtureSource) and source.weights == [20, 20, 19] and len(source) == 59
    assert {(source[i]["source_id"], source[i]["vendor"]) for i in range(59)} == {(0, "v0"), (1, "v1"), (2, "v2")}
    nested = make_source(f"{table}*2 + {table}?by=vendor*1")
    assert [part.name for part in nested.sources] == [f"{table}", *(f"{table}?by=vendor:v{i}" for i in range(3))]
    np.testing.assert_allclose(nested.weights, [2, 20 / 59, 20 / 59, 19 / 59])
    assert (nested.name, nested[60]["source_id"]) == (f"{table}*2 + {table}?by=vendor*1", 1)


def test_selections_in_a_mixture_and_weights_by_size(table):
    source = make_source(
        f"{table}?where=vendor:v2*size + {table}?where=kind:k_0*2 + {table}?part=concept:1/2&label=kind*0.5"
    )
    assert source.weights == [19, 2.0, 0.5] and source.class_names == ["k_0", "k_1"]
    nested = make_source(f"{table}?part=concept:1/2?where=vendor:v0")
    assert set(captions(nested)) == set(captions(make_source(f"{table}?part=concept:1/2"))) & {
        f"c{i}" for i in range(0, 60, 3)
    }


def test_records_with_a_field_and_records_that_name_nothing_held_out(tmp_path):
    told = (
        {"caption": "two clowns", "keywords": ["A Giraffe's neck", "zoo"]},
        {"caption": "Buses, pencil-box"},
        {"caption": "a bull train"},
    )
    more = {"caption": "two clowns", "keywords": []}, {"caption": "abacuses", "keywords": ["x"]}
    lines = [{"caption": text} for text in ("first line\nabacus", "first\tabacus sits", "one\u00a0abacus")]
    table = write_table(tmp_path, [*told, *more, *lines])
    assert captions(make_source(f"{table}?has=keywords")) == ["two clowns", "abacuses"]
    assert captions(make_source(f"{table}?without=emoji")) == ["a bull train", "two clowns"]
    clip_art, held_out = make_source("openclipart?without=emoji&has=keywords"), make_source("emoji", "val_seen_vendor")
    words = {word for i in range(len(clip_art)) for text in clip_art[i]["keywords"] for word in text.lower().split()}
    assert len(clip_art) == 4385 and not words & {held_out[i]["name"] for i in range(len(held_out))}


@pytest.mark.parametrize(
    "options, message",
    [
        ("without=scenes", "cannot read without=scenes; it is written as without=emoji"),
        ("where=vednor:v1", r"no record has the field 'vednor' \(did you mean 'vendor'\?\); fields: "),
        ("where=vendor:v11", r"no record has vendor 'v11' \(did you mean 'v1'\?\)"),
        ("where=vendor", "cannot read where=vendor; it is written as where=vendor:noto"),
        ("part=concept:3/2", "part 3/2 is not one of 1/2 to 2/2"),
        ("part=concept:half", "cannot read part=concept:half; it is written as part=concept:1/2"),
        (
            "where=vendor:v1&labels=kind",
            r"unknown option 'labels' \(did you mean 'label'\?\); options: where, part, label, by, has, without$",
        ),
        ("where=vendor:v1&where=concept:0&part=concept:9/9999", "no record is left"),
    ],
)
def test_wrong_selections(table, options, message):
    with pytest.raises(UserError, match=message) as error:
        make_source(f"{table}?{options}")
    assert "\n" not in str(error.value)


def test_the_embedded_vendors():
    source = make_source("emoji?by=vendor")
    assert len(source.sources) == 5 and len(source) == 6727 and min(source.weights) == 977
    assert source[0]["vendor"] != source[len(source) - 1]["vendor"]


# Labels of mixtures


def test_classes_of_one_name_are_one_class():
    a = MemorySource([{"label": i, "texts": ["x"]} for i in (0, 1, -1)], class_names=["cat", "dog"])
    b = MemorySource([{"label": i, "texts": ["x"]} for i in (0, 1)], class_names=["dog", "owl"])
    source = MixtureSource([a, MemorySource([{"texts": ["y"]}]), b], [1, 1, 1])
    assert source.class_names == ["cat", "dog", "owl"]
    assert [source[i].get("label") for i in range(6)] == [0, 1, -1, None, 1, 2]


def test_labels_that_do_not_fit():
    beyond = MemorySource([{"label": 2, "texts": ["x"]}], "pets", class_names=["cat", "dog"])
    with pytest.raises(
        UserError, match="pets: a record has label 2, but there are 2 class names, 0 to 1; -1 is no label"
    ):
        beyond[0]
    with pytest.raises(UserError, match="pets: a record has label 2"):
        loader(beyond, TEXT)
    nameless = MemorySource([{"label": 1, "texts": ["x"]}], "numbers")
    mixed = MixtureSource([MemorySource([{"label": 0, "texts": ["x"]}], class_names=["cat"]), nameless], [1, 1])
    with pytest.raises(
        UserError, match="numbers: its labels have no class names, and other sources of the mixture have class names"
    ):
        loader(mixed, TEXT)
