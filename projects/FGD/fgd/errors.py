"""Errors that end a command with a documented exit code and one line instead of a traceback."""


class UserError(ValueError):
    """Wrong usage, config, path, data or weights: what was found, where, and what to do."""

    exit_code = 2


class DivergedError(FloatingPointError):
    """A loss became infinite or NaN; carries the loss table."""

    exit_code = 3
