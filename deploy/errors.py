"""Errors the deploy commands report in one line, and the exit code each of them means."""

import errno
import os
import sys
import traceback
from typing import Callable, Optional, Sequence

from fgd_inputs.errors import UserError
from fgd_inputs.names import one_line

__all__ = ["ParityError", "UserError", "run_main"]


class ParityError(RuntimeError):
    """The exported graph could not be shown to equal the model."""

    exit_code = 4


def run_main(func: Callable[[Optional[Sequence[str]]], int], argv: Optional[Sequence[str]]) -> int:
    """Call `func(argv)`; an exception that carries `exit_code` becomes one line on stderr.

    Args:
        func: the command's body; returns its exit code.
        argv: arguments without the program name; None means `sys.argv[1:]`. `--debug` among them
            prints the traceback before the line.
    Returns:
        What `func` returned, or the exception's `exit_code`; 1 if what it printed is lost because
        nobody reads it (`| head -1`) or the disk is full; 130 after Ctrl-C. Any other exception
        passes through: it is a bug, and its traceback (exit code 1) is what we want to see.
    """
    arguments = sys.argv[1:] if argv is None else argv
    _take_any_text()
    try:
        exit_code = func(argv)
        sys.stdout.flush()  # now: in the interpreter's shutdown nobody could catch it
        return exit_code
    except BrokenPipeError:
        _discard_stdout()
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if getattr(error, "errno", None) == errno.ENOSPC:
            _discard_stdout()
            exit_code = 1
        if exit_code is None:
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return exit_code


def _take_any_text() -> None:
    """File names need not be text in the terminal's encoding: what is not is shown as "\\xe9"."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    """Python writes what is left in its buffer as it ends, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
