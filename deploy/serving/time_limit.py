"""How long one run of a graph, or one answer of a server, may take. Standard library only."""

import argparse

DEFAULT = 600.0
_seconds = DEFAULT


def time_limit() -> float:
    """Seconds; of this process, as `limit_time` has set them."""
    return _seconds


def limit_time(seconds: float) -> None:
    """Set what `time_limit` returns."""
    global _seconds
    _seconds = seconds


def add_option(parser: argparse.ArgumentParser) -> None:
    """--time-limit; its value is for `limit_time`."""
    parser.add_argument(
        "--time-limit",
        type=_positive,
        default=DEFAULT,
        metavar="SECONDS",
        help="longest that a run of the graph, or a server's answer, may take (%(default)s)",
    )


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 1e9:  # NaN neither
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds
