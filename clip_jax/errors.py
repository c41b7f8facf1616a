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


class Problems:
    """Collects the UserErrors of several checks, so that a user reads all of them at once.

    Attributes:
      lines: the messages, each once, in the order of the checks.
    """

    def __init__(self):
        self.lines = []

    def check(self, function, *arguments):
        """Returns `function(*arguments)`, or None where it raises a UserError, whose message is kept."""
        try:
            return function(*arguments)
        except UserError as error:
            found = error.args[1] if isinstance(error, Several) else [str(error)]
            for line in found:
                self.add(line)
            return None

    def add(self, line):
        """Keeps a message."""
        if line not in self.lines:
            self.lines.append(line)

    def end(self):
        """Raises one UserError for all messages: the only one as it is, or one a line."""
        if len(self.lines) == 1:
            raise UserError(self.lines[0])
        if self.lines:
            raise Several(f"{len(self.lines)} problems:" + "".join(f"\n  {line}" for line in self.lines), self.lines)


class Several(UserError):
    """Several wrong inputs; its second argument is the list of their messages."""

    def __str__(self):
        return self.args[0]
