"""Pairs of consecutive sentences: the text/text pairs of CLIPPO (Tschannen et al. 2023)."""

import array
import itertools
import re

import numpy as np

from clip_jax.data.files import FileReader, read_json
from clip_jax.data.records import BadRecord, BaseSource
from clip_jax.errors import UserError

# The end of a sentence: marks and closing quotes or brackets, then a space and no lower-case letter. After full-width
# marks anything may follow.
_SENTENCE_END = re.compile(r"""[.!?…؟।]+["'”’»)\]]* (?=[^a-z])|[。！？]+[」』”’）]* ?(?=.)""")
_MAX_PARAGRAPH = 2**16  # bytes; a longer paragraph is split


def split_sentences(text):
    """Returns the sentences of a text, each on one line.

    Punctuation alone decides: an abbreviation before a capital letter also ends a sentence.
    """
    text, ends = " ".join(text.split()), [0]
    ends += [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[start:end].strip() for start, end in itertools.pairwise([*ends, len(text)]) if start < end]


class SentencePairSource(BaseSource):
    """Pairs of consecutive sentences of plain text.

    A record has `sentences` and `texts`, both the list of its two sentences, and `text_pair`, 1. In .jsonl files the
    field `text` of each line is a document. In other files a document is a paragraph: it ends at a blank line or
    after 64 KiB. A document with n sentences gives n - 1 records. The files are read through once; 40 bytes a
    document are held in memory.

    Args:
      files: list of paths.
      name: str, for messages.

    Raises UserError when no document has two sentences.
    """

    def __init__(self, files, name="text"):
        super().__init__(name)
        self._paths, self._files = list(files), FileReader()
        spans = array.array("q")
        for number, path in enumerate(self._paths):
            with open(path, "rb") as file:
                for start, document in self._documents(path, file):
                    if (pairs := len(self._sentences(path, document)) - 1) > 0:
                        spans.extend((number, start, len(document), pairs))
        self._spans = np.frombuffer(spans, np.int64).reshape(-1, 4)
        self._ends = self._spans[:, 3].cumsum()
        if not len(self._spans):
            where = " in a field 'text'" if self._is_json(path) else ""
            raise UserError(f"{name}: no document with two sentences{where}")

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, index):
        document = int(np.searchsorted(self._ends, index, "right"))
        number, start, size, pairs = self._spans[document].tolist()
        path, first = self._paths[number], index - int(self._ends[document]) + pairs
        sentences = self._sentences(path, self._files.read(path, start, size))[first : first + 2]
        if len(sentences) < 2:
            raise BadRecord("changed file")
        return {"sentences": sentences, "texts": sentences, "text_pair": 1}

    @staticmethod
    def _is_json(path):
        return path.endswith((".jsonl", ".json"))

    def _documents(self, path, lines):
        """Yields `(offset, bytes)` of every document."""
        start, document = 0, b""
        for line in lines:
            document += line
            if self._is_json(path) or not line.strip() or len(document) > _MAX_PARAGRAPH:
                yield start, document
                start, document = start + len(document), b""
        yield start, document

    def _sentences(self, path, document):
        text = document.decode("utf-8", "replace")
        if self._is_json(path):
            row = read_json(text)
            text = row.get("text") if isinstance(row, dict) else None
        return split_sentences(text) if isinstance(text, str) else []
