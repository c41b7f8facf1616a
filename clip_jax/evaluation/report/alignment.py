"""Which patch of an image matches which word of its text, for methods with one vector per token (FILIP).

A patch has the colour of the word whose token is the most similar to it, as in figure 4 of Yao et al. 2022. It has no
colour where the start or the end of the text is more similar than any word.
"""

import html
import math
from dataclasses import dataclass

import numpy as np

from clip_jax.evaluation.embed import evenly

IMAGES = 24  # at most


@dataclass
class Alignment:
    """Images, as the model sees them, and a text for each.

    Attributes:
      words: of each text, the words that are not cut off.
      similarity: of each image and its text float32 `[rows, columns, words + 1]`, of each patch and word; the last
        one is the start or end of the text, -inf where it has none.
      images: `{"image": uint8 [size, size, 3]}` of each image.
    """

    section = "Words and patches"
    intro = """<p>Each image is cut into the patches that the model sees. A patch has the colour of the word of the
image's text to which it is the most similar, and none where that is the start or end of the text. Next to a word: its
share of the patches, and the similarity of the best one, which is framed.</p>"""

    words: list[list[str]]
    similarity: list[np.ndarray]
    images: list[dict]

    def draw(self, page):
        """Returns the images with coloured patches and their words as HTML."""
        _, thumbnail = page.thumbnails(self.images, range(len(self.images)), 128)
        cards = []
        for number, (words, similarity) in enumerate(zip(self.words, self.similarity, strict=True)):
            best, patches = similarity.argmax(2).reshape(-1), similarity.reshape(-1, similarity.shape[2])
            framed = set(patches[:, : len(words)].argmax(0)) if words else set()
            cells = [_patch(words, best[k], patches[k], k in framed) for k in range(len(best))]
            lines = []
            for k, word in enumerate(words):
                values = f"{(best == k).mean():.0%} {patches[:, k].max():.2f}"
                colour = f' style="--c:{_colour(k, len(words))}"'
                lines.append(f"<li{colour}><span>{html.escape(word)}</span><b>{values}</b></li>")
            grid = f'<div class="grid" style="--n:{similarity.shape[1]}">{"".join(cells)}</div>'
            image = f'<div class="image">{thumbnail(number, " ".join(words))}{grid}</div>'
            cards.append(f'<div class="card patches">{image}<div><ol>{"".join(lines)}</ol></div></div>')
        return f'<div class="cards">{"".join(cards)}</div>'


def align(model, z_image, z_text, texts, records):
    """Returns the `Alignment` of at most 24 images, evenly spaced.

    Args:
      model: has `image_view` and `tokenizer`.
      z_image: float32 `[n, P, E]`, with or without a class token ahead of the patches.
      z_text: float32 `[n, L, E]`, zeros for padding.
      texts: n strings.
      records: n records with "image".

    Returns: None where the image embeddings are no square grid of patches or the text embeddings no tokens.
    """
    if z_image.ndim != 3 or z_text.ndim != 3 or not hasattr(getattr(model, "tokenizer", None), "encode"):
        return None
    side = math.isqrt(z_image.shape[1])
    if z_image.shape[1] - side**2 not in (0, 1):
        return None
    result = Alignment([], [], [])
    for row in evenly(len(texts), IMAGES):
        similarity = z_image[row][-(side**2) :] @ z_text[row].T
        words, places = words_of(model.tokenizer, texts[row], z_text.shape[1])
        rest = z_text[row].any(-1)
        rest[[place for of_word in places for place in of_word]] = False
        columns = [similarity[:, of_word].max(1) for of_word in places] + [similarity[:, rest].max(1, initial=-np.inf)]
        result.words.append(words)
        result.similarity.append(np.stack(columns, 1).reshape(side, side, -1).astype(np.float32))
        result.images.append({"image": model.image_view(records[row], None)})
    return result


def words_of(tokenizer, text, context):
    """Returns the words of a text and the positions of each word's tokens; a word that is cut off is left out.

    Args:
      tokenizer: the tokenizer.
      text: a string.
      context: the length of the token sequence.
    """
    start = int(tokenizer.sot_id is not None)
    end = context - int(tokenizer.options["eot"])
    split, words = text.split(), []
    places, first = [], start
    for number in range(len(split)):
        last = min(start + len(tokenizer.encode(" ".join(split[: number + 1]))), end)
        if last > first:
            words.append(split[number])
            places.append(range(first, last))
        first = max(first, last)
    return words, places


def _patch(words, word, similarity, is_framed):
    frame = ' class="best"' if is_framed else ""
    if word == len(words):
        return f"<i{frame}></i>"
    title = f"{html.escape(words[word])} {similarity[word]:.2f}"
    return f'<i{frame} style="--c:{_colour(word, len(words))}" title="{title}"></i>'


def _colour(word, words):
    return f"hsl({360 * word // words} 85% 50%)"
