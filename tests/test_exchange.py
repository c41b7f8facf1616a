"""`?exchange=`: wrong pairs of a given share, the same in every run."""

import pytest

from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.exchange import join
from clip_jax.errors import UserError


def source(n=2000):
    return MemorySource([{"image": i, "texts": [f"text {i}"], "name": i, "synthetic": f"of {i}"} for i in range(n)])


def partners(exchanged):
    """Returns, of each record, the record that its texts come from."""
    return [exchanged[i]["name"] for i in range(len(exchanged))]


def test_a_share_of_the_records_exchange_all_but_their_images_among_themselves():
    found = join(source(), "0.3")
    names = partners(found)
    moved = [i for i, name in enumerate(names) if name != i]
    assert 0.26 < len(moved) / len(names) < 0.34
    assert sorted(names) == list(range(2000)) and {names[i] for i in moved} == set(moved)
    for i in moved[:50]:
        record = found[i]
        assert record["image"] == i and record["texts"] == [f"text {names[i]}"]
        assert record["synthetic"] == f"of {names[i]}"
    assert partners(join(source(), "0.3")) == names
    more = {i for i, name in enumerate(partners(join(source(), "0.6"))) if name != i}
    assert set(moved) < more and 0.56 < len(more) / 2000 < 0.64


def test_fields_that_stay_and_the_ends_of_the_range():
    found = join(source(), "1:synthetic")
    assert all(name != i and found[i]["synthetic"] == f"of {i}" for i, name in enumerate(partners(found)))
    assert partners(join(source(10), "0")) == list(range(10))
    assert partners(join(source(1), "1")) == [0]


def test_the_embedded_captions_keep_their_synthetic_ones():
    plain = make_source("emoji?columns=emoji_captions")
    found = make_source("emoji?columns=emoji_captions?exchange=0.5:synthetic")
    moved = [i for i in range(300) if found[i]["texts"] != plain[i]["texts"]]
    assert 100 < len(moved) < 200
    assert all(found[i]["synthetic"] == plain[i]["synthetic"] and found[i]["image"] == plain[i]["image"] for i in moved)
    mixed = make_source("emoji?by=vendor?exchange=0.5")
    assert len(mixed) == len(plain) and mixed[0]["source_id"] == 0


@pytest.mark.parametrize("value", ["", "a", "1.5", "-0.1", "0.3:", "0.3:a b"])
def test_wrong_shares(value):
    with pytest.raises(UserError, match="cannot read exchange="):
        join(source(4), value)


def test_sources_of_blocks_are_refused():
    blocks = source(4)
    blocks.sequential = True
    with pytest.raises(UserError, match="read in blocks"):
        join(blocks, "0.5")
