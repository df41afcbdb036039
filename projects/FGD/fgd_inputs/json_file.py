"""JSON files, and single values of them, from whoever wrote them."""

import json
import os
from typing import Any, Optional

from .errors import UserError

_SHOWN = 60  # characters of a value in a message


def read_json(path: str, what: str) -> Any:
    """The content of a file in UTF-8, with or without a byte order mark.

    Args:
        what: for messages, as "dataset JSON".
    Raises:
        UserError: missing, unreadable, empty, not JSON, or nested too deeply; names the path.
    """
    if not os.path.isfile(path):
        raise UserError(f"{what} {path} does not exist")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from error
    except RecursionError:
        raise UserError(f"{what} {path} is nested too deeply to be read") from None
    except ValueError as error:
        kind = "is empty (0 bytes)" if os.path.getsize(path) == 0 else f"is not JSON: {error}"
        raise UserError(f"{what} {path} {kind}") from error


def number(value: Any) -> Optional[float]:
    """A JSON number as a float, which may be infinite or NaN; None for anything else.

    true and false are no numbers, nor is an integer beyond a float's range.
    """
    if type(value) not in (int, float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def whole(value: Any) -> Optional[int]:
    """A JSON number without a fraction as an int, so that 3.0 is 3; None for anything else."""
    if type(value) is int:
        return value
    return int(value) if type(value) is float and value.is_integer() else None


def shown(value: Any) -> str:
    """A value in a message: one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # too deep; more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
