"""Errors that end a command with a documented exit code and one line instead of a traceback."""

from fgd_inputs.errors import UserError

__all__ = ["DivergedError", "StoppedError", "UserError", "in_one_line"]


def in_one_line(error: Exception, longest: int = 200) -> str:
    """Type and message, of which so many characters are kept."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:longest]}"


class DivergedError(FloatingPointError):
    """A loss became infinite or NaN; carries the loss table."""

    exit_code = 3


class StoppedError(Exception):
    """A signal asked the run to stop, and its state is saved; all processes raise it together.

    The code is EX_TEMPFAIL of sysexits.h: nothing is wrong, go on later.
    """

    exit_code = 75
