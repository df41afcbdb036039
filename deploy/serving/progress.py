"""A bar on one line of stderr where a person watches; nothing in a log. Standard library only."""

import sys

_BAR = 30  # characters of a full one


def show_progress(done: int, total: int, what: str = "images") -> None:
    """Draw the bar anew; with the last of `total` the line ends."""
    if sys.stderr.isatty():
        bar = "#" * (_BAR * done // max(total, 1))
        end = "\n" if done == total else ""
        print(f"\r[{bar:.<{_BAR}}] {done}/{total} {what}", end=end, file=sys.stderr, flush=True)
