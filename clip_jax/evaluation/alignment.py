"""Which patch of a picture answers which word of its text, for methods with an embedding for each token (FILIP).

A patch is shown in the colour of the word whose token is the most similar to it, as in figure 4 of Yao et al. 2022; one that finds
the start or end of the text more similar than any word stays as it is.
"""

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass

PICTURES = 24  # at most
INTRO = """<p>Each picture is cut into the patches that the model sees. A patch has the colour of the word of the picture's text to which
it is the most similar, and none where that is the start or end of the text. Beside a word: its share of the patches, and the similarity
of the best one, which is framed.</p>"""


@dataclass
class Alignment:
    """Pictures, as the model sees them, and a text for each.

    Attributes:
        words: of each text, those that the model has not cut off.
        similarity: of each picture and its text float32 [rows, columns, words + 1], of each patch and word; the last one is the start or
            end of the text, -inf where it has none.
        pictures: {"image": uint8 [size, size, 3]} of each.
    """

    words: list[list[str]]
    similarity: list[np.ndarray]
    pictures: list[dict]


def align(model, z_image, z_text, texts, records):
    """The `Alignment` of at most 24 pictures, evenly spaced; None where embeddings are no grid of patches, or no texts' tokens.

    Args:
        model: has `image_view` and `tokenizer`.
        z_image: float32 [n, P, E], with or without a class token ahead of the patches. z_text: float32 [n, L, E], zeros for padding.
        texts: n strings. records: n, with "image".
    """
    if z_image.ndim != 3 or z_text.ndim != 3 or not hasattr(getattr(model, "tokenizer", None), "encode"):
        return None
    side = math.isqrt(z_image.shape[1])
    if z_image.shape[1] - side**2 not in (0, 1):
        return None
    result = Alignment([], [], [])
    for row in np.unique(np.arange(PICTURES) * len(texts) // PICTURES) if len(texts) else ():
        similarity = z_image[row][-(side**2) :] @ z_text[row].T
        words, places = words_of(model.tokenizer, texts[row], z_text.shape[1])
        rest = z_text[row].any(-1)
        rest[[place for of_word in places for place in of_word]] = False
        columns = [similarity[:, of_word].max(1) for of_word in places] + [similarity[:, rest].max(1, initial=-np.inf)]
        result.words.append(words)
        result.similarity.append(np.stack(columns, 1).reshape(side, side, -1).astype(np.float32))
        result.pictures.append({"image": model.image_view(records[row], None)})
    return result


def words_of(tokenizer, text, context):
    """The words of a text, and the positions of each one's tokens among the `context` that the tokenizer gives; none that is cut off."""
    start = int(tokenizer.sot_id is not None)
    end = context - int(tokenizer.options["eot"])
    split, words, places, first = text.split(), [], [], start
    for number in range(len(split)):
        last = min(start + len(tokenizer.encode(" ".join(split[: number + 1]))), end)
        if last > first:
            words.append(split[number])
            places.append(range(first, last))
        first = max(first, last)
    return words, places


def draw(page, item):
    """The pictures with coloured patches, and their words, as HTML for a report."""
    _, thumbnail = page.thumbnails(item.pictures, range(len(item.pictures)), 128)
    cards = []
    for number, (words, similarity) in enumerate(zip(item.words, item.similarity, strict=True)):
        best, patches = similarity.argmax(2).reshape(-1), similarity.reshape(-1, similarity.shape[2])
        framed = set(patches[:, : len(words)].argmax(0)) if words else set()
        cells = [_patch(words, best[k], patches[k], k in framed) for k in range(len(best))]
        lines = []
        for k, word in enumerate(words):
            figures = f"{(best == k).mean():.0%} {patches[:, k].max():.2f}"
            lines.append(
                f'<li style="--c:{_colour(k, len(words))}"><span>{html.escape(word)}</span><b>{figures}</b></li>'
            )
        grid = f'<div class="grid" style="--n:{similarity.shape[1]}">{"".join(cells)}</div>'
        picture = thumbnail(number, " ".join(words))
        cards.append(
            f'<div class="card patches"><div class="picture">{picture}{grid}</div><div><ol>{"".join(lines)}</ol></div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _patch(words, word, similarity, is_framed):
    frame = ' class="best"' if is_framed else ""
    if word == len(words):
        return f"<i{frame}></i>"
    return f'<i{frame} style="--c:{_colour(word, len(words))}" title="{html.escape(words[word])} {similarity[word]:.2f}"></i>'


def _colour(word, words):
    return f"hsl({360 * word // words} 85% 50%)"
