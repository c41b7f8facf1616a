"""The errors that a user is meant to read: one line, no traceback."""

import difflib


class UserError(ValueError):
    """Wrong input. A command prints the message as one line and exits with status 2.

    The message names the field, the value given and the values allowed.
    """


class TextLabelError(UserError):
    """A label field that holds text, of which only a selection makes classes; `field` is its name in records."""

    def __init__(self, source, field):
        super().__init__(
            f"{source}: label field {field!r} holds text; must hold integers or a TFDS ClassLabel, or write "
            f"{source}?label={field}, which makes classes of the text"
        )
        self.field = field


class StorageError(Exception):
    """Storage failed, which may pass. A command prints the message as one line and exits with status 44.

    The message names the folder or bucket.
    """


def did_you_mean(word, words):
    """Returns the end of a message, " (did you mean 'x'?)", with the nearest of `words`; empty when none is near."""
    match = difflib.get_close_matches(str(word), [str(w) for w in words], 1, 0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def unknown(what, name, allowed):
    """Returns the UserError for a name that is not in `allowed`. It suggests the nearest name or lists all of them."""
    allowed = [str(a) for a in allowed]
    return UserError(f"{what} {str(name)!r}{did_you_mean(name, allowed) or '; allowed: ' + ', '.join(allowed)}")
