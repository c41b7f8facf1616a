"""Builds evaluation/imagenet_ids.json: each WordNet id of ImageNet's classes with its words in WordNet 3.0.

    python -m clip_jax.tools.build.imagenet [--cache FOLDER] [--out FOLDER]

Needs what `clip_jax.tools.build.thesaurus` needs. The ids and their order are those of the file in the package.
"""

import json
import subprocess
import tempfile
from pathlib import Path

from clip_jax.tools.build.packages import fetch
from clip_jax.tools.build.tfds_writer import command
from clip_jax.tools.build.thesaurus import PACKAGE

OUT = Path(__file__).parents[2] / "evaluation"
FILE = "imagenet_ids.json"


def words_of(ids, lines):
    """Returns `{id: words, separated by ", "}`; the id of a noun is "n" and its 8-digit offset in `data.noun`."""
    found = {}
    for line in lines:
        fields = line.split()
        if not line.startswith(" ") and f"n{fields[0]}" in ids:
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            found[f"n{fields[0]}"] = ", ".join(word.replace("_", " ") for word in words)
    return {wnid: found[wnid] for wnid in ids}


def build(cache, out):
    """Writes the file into the folder `out`; returns `{file name: number of classes}`."""
    ids = list(json.loads((OUT / FILE).read_text()))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", str(fetch(PACKAGE, cache)), folder], check=True)
        found = words_of(ids, (Path(folder) / "usr/share/wordnet/data.noun").read_text("ascii").splitlines())
    (out / FILE).write_text(json.dumps(found, indent=0) + "\n")
    return {FILE: len(found)}


if __name__ == "__main__":
    command(__doc__, build, OUT)
