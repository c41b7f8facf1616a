"""The exceptions that a user is meant to read: one line, no traceback."""


class UserError(ValueError):
    """Wrong input: a command prints the message as one line and exits with status 2.

    The message names what was wrong, what was given and what is allowed.
    """
