"""The rules of the filter and their thresholds."""

import dataclasses

from clip_jax.errors import UserError


def flag(name):
    """Returns the command-line flag of a threshold."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The thresholds of the filter; the defaults are ALIGN's.

    Attributes:
      min_side: pixels; an image whose shorter side is at most this is removed.
      max_aspect: an image is removed when its longer side is at least this many times its shorter side.
      max_texts: an image with more distinct texts is removed.
      max_images: a text of more distinct images is removed.
      vocabulary: number of the most frequent words and word pairs; a text with any other n-gram is removed.
      min_words: a text with fewer words is removed.
      max_words: a text with more words is removed.
      near_duplicate: bits; an image whose hash differs from a test image's in at most this many is removed.
      unsafe: record field; an image is removed when it holds "NSFW", "unsafe", "true", "yes", "1" or a number of at
        least 0.5. "": no such rule.

    Raises UserError for an invalid threshold.
    """

    min_side: int = 200
    max_aspect: float = 3.0
    max_texts: int = 1000
    max_images: int = 10
    vocabulary: int = 100_000_000
    min_words: int = 3
    max_words: int = 20
    near_duplicate: int = 7
    unsafe: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and value < 0:
                raise UserError(f"{flag(field.name)}={value}: must be at least 0")
        if self.min_words > self.max_words:
            raise UserError(
                f"--min-words={self.min_words} is more than --max-words={self.max_words}: no text would be kept"
            )
        if self.near_duplicate > 15:
            raise UserError(f"--near-duplicate={self.near_duplicate}: must be at most 15 of the 128 bits")


#: The rules of the paper.
ALIGN = Rules()

#: `{rule: (its threshold, what it removes)}`. The rules before `shared_text` judge a record and its image. The others,
#: except `no_text`, judge each text.
RULES = {
    "unreadable": (None, "unreadable record or image"),
    "unsafe": ("unsafe", "image marked as unsafe"),
    "small": ("min_side", "image whose shorter side has at most this many pixels"),
    "elongated": ("max_aspect", "image whose longer side is at least this many times its shorter side"),
    "many_texts": ("max_texts", "image with more than this many texts"),
    "test_picture": ("near_duplicate", "image whose hash differs from a test image's in at most this many of 128 bits"),
    "shared_text": ("max_images", "text of more than this many images"),
    "rare_words": ("vocabulary", "text with a word or word pair that is not among this many most frequent ones"),
    "too_short": ("min_words", "text of fewer than this many words"),
    "too_long": ("max_words", "text of more than this many words"),
    "no_text": (None, "record without a text"),
}
