"""The tables of docs/recipes/ against the configurations that they describe."""

import ast
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from clip_jax import config

ROOT = pathlib.Path(__file__).parent.parent
COLUMNS = ["what", "field", "paper", "official code", "ours", "why"]
#: Rows that every recipe has, by name where no field holds the value.
NAMES = ("data", "initialisation")
FIELDS = {"data.batch_size", "train.steps", "optim.name", "optim.lr", "optim.weight_decay", "optim.no_decay"}
FIELDS |= {"optim.schedule", "optim.warmup_steps", "optim.warmup_from", "optim.lr_end", "optim.grad_clip_norm"}
FIELDS |= {"data.augment", "model.image_mean", "model.image_std", "eval.transform"}
CONSTANTS = {"adamw": {"optim.b1", "optim.b2", "optim.eps"}, "sgd": {"optim.b1"}, "adafactor": {"optim.b1"}}
CONSTANTS["lamb"] = CONSTANTS["adamw"] | {"optim.lamb_adapt_all", "optim.lamb_max_norm", "optim.lamb_bias_correction"}


def sections():
    """Returns `[(file, variants, base or None, rows)]`, one of each heading of docs/recipes/*.md."""
    found = []
    for path in sorted((ROOT / "docs" / "recipes").glob("*.md")):
        if path.name == "README.md":
            continue
        for part in re.split(r"^## ", path.read_text(), flags=re.M)[1:]:
            heading, _, body = part.partition("\n")
            variants, _, base = heading.partition(" differ")
            names = [re.findall(r"`([a-z_]+\.py:[a-z0-9_]+)`", text) for text in (variants, base)]
            rows = [_cells(line) for line in body.splitlines() if line.startswith("|")]
            assert rows[0] == COLUMNS, f"{path.name}: {heading}: the columns are {rows[0]}"
            assert all(len(row) == len(COLUMNS) for row in rows), f"{path.name}: {heading}: a row of another length"
            found.append((path.name, tuple(names[0]), next(iter(names[1]), None), rows[2:]))
    return found


def _cells(line):
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def flat(value, prefix=""):
    if isinstance(value, ConfigDict):
        return {k: v for name, x in value.items() for k, v in flat(x, f"{prefix}.{name}" if prefix else name).items()}
    return {prefix: value}


def load(name):
    return flat(config.load(str(ROOT / "configs" / name)))


def _fields(row):
    return re.findall(r"`([^`]+)`", row[1])


SECTIONS = sections()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s[1][0])
def test_ours_is_the_configuration(section):
    _, variants, base, rows = section
    listed = {field for row in rows for field in _fields(row)}
    for variant in variants:
        values, other = load(variant), load(base or variants[0])
        for row in rows:
            # A value in backticks is compared. A cell without them describes a whole section, such as model.image.
            literal = re.fullmatch(r"`(.*)`", row[4])
            for field in _fields(row):
                if literal:
                    wanted = float("inf") if literal[1] == "inf" else ast.literal_eval(literal[1])
                    assert field in values, f"{variant} has no field {field}"
                    assert values[field] == wanted, f"{variant}: {field} is {values[field]!r}, not {wanted!r}"
                else:
                    is_section = any(k.startswith(field + ".") for k in (*values, *other))
                    assert is_section, f"{variant}: {field}: give the value in backticks"
        changed = {k for k in values.keys() | other.keys() if values.get(k, None) != other.get(k, None)}
        allowed = listed if base else set()
        missing = {k for k in changed if not any(k == f or k.startswith(f + ".") for f in allowed)}
        assert not missing, f"{variant} differs from {base or variants[0]} in fields without a row: {sorted(missing)}"


@pytest.mark.parametrize("section", [s for s in SECTIONS if not s[2]], ids=lambda s: s[1][0])
def test_a_recipe_has_all_rows(section):
    _, variants, _, rows = section
    values = load(variants[0])
    wanted = FIELDS | CONSTANTS[values["optim.name"]] | ({"model.text.context"} & values.keys())
    assert not wanted - {field for row in rows for field in _fields(row)}
    assert set(NAMES) <= {row[0] for row in rows}


def test_every_published_recipe_has_a_table():
    described = {name for _, variants, _, _ in SECTIONS for name in variants}
    for path in sorted((ROOT / "configs").glob("*.py")):
        module, _ = config.load_module(str(path))
        for variant in module.VARIANTS:
            name = f"{path.name}:{variant}"
            c = load(name)
            if c["model.image.size"] >= 224 and not c["init_from_model"]:
                assert name in described, f"{name} has no table in docs/recipes/"
