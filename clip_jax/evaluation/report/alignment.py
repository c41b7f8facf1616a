"""Which patch of an image matches which word of its text, and the text as a whole.

For methods with one vector per token (FILIP) or with `Method.patch_similarity` (OneR). A patch has the colour of the
word whose token is the most similar to it, as in figure 4 of Yao et al. 2022. It has no colour where the start or the
end of the text is more similar than any word. The heat map shows the mean over the words (zero-shot localisation, Jang
et al. 2023; the mean is an assumption).
"""

import html
import math
from dataclasses import dataclass

import numpy as np

from clip_jax.evaluation.embed import evenly
from clip_jax.evaluation.report.page import data_uri

IMAGES = 24  # at most
_HEAT = ((38, 60, 160), (70, 170, 190), (250, 215, 70), (215, 40, 30))  # from the least to the most similar patch
_OPACITY = 0.6


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
share of the patches, and the similarity of the best one, which is framed. Below: the mean similarity of a patch and all
words, from the least similar patch (blue) to the most similar one (red).</p>"""

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
            picture = thumbnail(number, " ".join(words))
            image = f'<div class="image">{picture}{grid}</div>'
            if words:
                mean = heat(similarity)
                image += f'<div class="image">{picture}{_overlay(mean)}</div>'
                lines.append(f"<li><span>all words</span><b>{mean.min():.2f} – {mean.max():.2f}</b></li>")
            cards.append(
                f'<div class="card patches"><div class="images">{image}</div><div><ol>{"".join(lines)}</ol></div></div>'
            )
        return f'<div class="cards">{"".join(cards)}</div>'


def align(model, z_image, z_text, texts, records):
    """Returns the `Alignment` of at most 24 images, evenly spaced.

    Args:
      model: has `image_view` and `tokenizer`, and may have `patch_similarity`.
      z_image: float32 `[n, P, E]`, with or without a class token ahead of the patches.
      z_text: float32 `[n, L, E]`, zeros for padding.
      texts: n strings.
      records: n records with "image".

    Returns: None where the patches are no square grid, and for a model without `patch_similarity` whose embeddings are
    not those of patches and tokens.
    """
    if not hasattr(getattr(model, "tokenizer", None), "encode"):
        return None
    rows = evenly(len(texts), IMAGES)
    z_image, z_text = z_image[rows], z_text[rows]
    texts = [texts[row] for row in rows]
    of_pairs = getattr(model, "patch_similarity", None)
    if of_pairs is None and not z_image.ndim == z_text.ndim == 3:
        return None
    images = np.stack([model.image_view(records[row], None) for row in rows])
    similarity = of_pairs(images, texts) if of_pairs else _token_similarity(z_image, z_text)
    side = math.isqrt(similarity.shape[1])
    if similarity.shape[1] - side**2 not in (0, 1):
        return None
    result = Alignment([], [], [{"image": image} for image in images])
    for text, of_tokens in zip(texts, similarity[:, -(side**2) :], strict=True):
        words, places = words_of(model.tokenizer, text, of_tokens.shape[1])
        rest = np.isfinite(of_tokens).any(0)
        rest[[place for of_word in places for place in of_word]] = False
        columns = [of_tokens[:, of_word].max(1) for of_word in places] + [of_tokens[:, rest].max(1, initial=-np.inf)]
        result.words.append(words)
        result.similarity.append(np.stack(columns, 1).reshape(side, side, -1).astype(np.float32))
    return result


def heat(similarity):
    """Returns the mean similarity of each patch and the words, float32 `[rows, columns]`.

    Args:
      similarity: float32 `[rows, columns, words + 1]`, at least one word; the last column does not count.
    """
    return similarity[..., :-1].mean(-1)


def _token_similarity(z_image, z_text):
    """Returns the similarity of the tokens of each pair, `[n, P, L]`, -inf for the padding of the text."""
    similarity = np.einsum("npe,nle->npl", z_image, z_text)
    return np.where(z_text.any(-1)[:, None], similarity, -np.inf)


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


def _overlay(values):
    """Returns float `[rows, columns]` as a half-transparent image with a pixel each, from the least to the largest."""
    low, high = float(values.min()), float(values.max())
    position = (values - low) / max(high - low, 1e-12)
    at = np.linspace(0, 1, len(_HEAT))
    rgb = np.stack([np.interp(position, at, channel) for channel in np.transpose(_HEAT)], -1)
    rgba = np.concatenate([rgb, np.full((*values.shape, 1), 255 * _OPACITY)], -1)
    return f'<img class="over" alt="heat map" src="{data_uri(np.rint(rgba).astype(np.uint8), "PNG")}">'


def _patch(words, word, similarity, is_framed):
    frame = ' class="best"' if is_framed else ""
    if word == len(words):
        return f"<i{frame}></i>"
    title = f"{html.escape(words[word])} {similarity[word]:.2f}"
    return f'<i{frame} style="--c:{_colour(word, len(words))}" title="{title}"></i>'


def _colour(word, words):
    return f"hsl({360 * word // words} 85% 50%)"
