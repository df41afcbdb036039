"""How far the runs of a study are: on a terminal a line for each, in a log one line a minute.

Read from the metrics.json that each run writes.
"""

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, Dict, NamedTuple, Optional, Sequence, TextIO, Tuple

from fgd_inputs.json_file import number

from ..errors import UserError
from ..yaml_config import leaves, parse_yaml
from .files import has_results
from .run import Run

_EVERY = {True: 1.0, False: 60.0}  # seconds between two looks, on a terminal or not
_READ = (("iteration", "iteration"), ("seconds_left", "eta_seconds"), ("ap", "bbox/AP"))


class State(NamedTuple):
    """What the lines of a metrics.json that have been read say; None where none did."""

    read: int = 0  # bytes
    iteration: Optional[float] = None  # counted from 0
    seconds_left: Optional[float] = None
    ap: Optional[float] = None


def follow(path: Path, before: State) -> State:
    """The state after what the file has more than when it was read before.

    A resumed run cuts off what its checkpoint has not seen; then it is read from the beginning.
    """
    if not path.exists():
        return State()
    if path.stat().st_size < before.read:
        before = State()
    with open(path, "rb") as file:
        file.seek(before.read)
        whole = file.read().rpartition(b"\n")[0]
    found = before._asdict()
    for line in whole.splitlines():
        values = _values(line)
        for name, key in _READ:
            if number(values.get(key)) is not None:
                found[name] = number(values[key])
    found["read"] = before.read + len(whole) + (1 if whole else 0)
    return State(**found)


def _values(line: bytes) -> dict:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def describe(run: Run, state: State, iterations: Optional[int], age: float) -> str:
    """For example "FGD, seed 0: 240 of 600, 3 min left, AP 21.3".

    Args:
        iterations: in all. age: seconds since the file was written.
    """
    if state.iteration is None:
        chosen = run.select and has_results(run.trained)  # its best checkpoint is left to do
        return f"{run}: {'evaluating' if run.eval_only or chosen else 'starting'}"
    done = min(round(state.iteration) + 1, iterations or math.inf)  # an evaluation counts one more
    parts = [f"{done} of {iterations}" if iterations else f"{done} iterations"]
    if iterations and done >= iterations:
        parts.append("evaluating")
    elif state.seconds_left is not None:
        parts.append(f"{_duration(max(0.0, state.seconds_left - age))} left")
    if state.ap is not None:
        parts.append("AP none" if math.isnan(state.ap) else f"AP {state.ap:.1f}")
    return f"{run}: {', '.join(parts)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """Shows how far runs are, on stderr; `clear` it before any other line is written."""

    def __init__(self, stream: Optional[TextIO] = None, clock: Callable[[], float] = time.time):
        self.stream, self.clock = stream or sys.stderr, clock
        self.terminal = self.stream.isatty()
        self.states: Dict[Path, State] = {}
        self.iterations: Dict[Path, int] = {}
        self.looked, self.drawn = clock(), 0

    def clear(self) -> None:
        """Take the lines off the terminal; Ctrl-C has written behind them."""
        if self.drawn:
            self.stream.write(f"\r\x1b[{self.drawn}A\x1b[J")
            self.stream.flush()
        self.drawn = 0

    def show(self, running: Sequence[Tuple[Run, float]]) -> None:
        """Call it often: it looks once a second, in a log once a minute.

        Args:
            running: runs, and for how many seconds each has been.
        """
        now = self.clock()
        if not running or now - self.looked < _EVERY[self.terminal]:
            return
        self.looked = now
        lines = [self._line(run, now - seconds) for run, seconds in running]
        if self.terminal:
            self.clear()
            width = shutil.get_terminal_size().columns - 1  # a line that wraps would count as two
            self.drawn, text = len(lines), "".join(f"{line[:width]}\n" for line in lines)
        else:
            text = f"{'; '.join(lines)}\n"
        self.stream.write(text)  # at once, so that no other process can write between
        self.stream.flush()

    def _line(self, run: Run, started: float) -> str:
        path, state, age = run.folder / "metrics.json", State(), 0.0
        try:
            age = self.clock() - path.stat().st_mtime
            if self.clock() - age >= started:  # else it is of an earlier attempt
                state = self.states[path] = follow(path, self.states.get(path, State()))
        except OSError:
            pass  # nothing is written yet
        return describe(run, state, self._of(run), age)

    def _of(self, run: Run) -> Optional[int]:
        """SOLVER.MAX_ITER of the config that the run has written."""
        path = run.folder / "config.yaml"
        if path not in self.iterations and run.folder / "metrics.json" in self.states:
            try:
                found = dict(leaves(parse_yaml(path.read_text(), str(path))))
                self.iterations[path] = int(found["SOLVER.MAX_ITER"])
            except (OSError, UserError, KeyError, ValueError, TypeError):
                return None
        return self.iterations.get(path)
