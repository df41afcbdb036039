"""How long `student-long` trains: as long as distillation took, by the clock of the same study."""

import math
import statistics
from pathlib import Path
from typing import Dict, List, Sequence

from detectron2.config import CfgNode

from fgd_inputs.json_file import read_json

from ..errors import UserError
from ..visualize import read_metrics
from .arms import LONG, STUDENT, main_arms
from .files import is_finished, write_json
from .run import Run

FILE = f"{LONG}.json"
_KEYS = {"arm", "seconds", "ratio", "iterations", "scheduled"}


def step_seconds(folders: Sequence[Path]) -> float:
    """Median seconds per iteration of runs, as their metrics.json have them.

    Of steps, not of whole runs: these may have been interrupted, and a longer run evaluates once
    like any other. The median, so that a machine that was busy for a while counts little. NaN if
    there is no figure.
    """
    times: List[float] = []
    for folder in folders:
        path = folder / "metrics.json"
        if path.exists():
            times += [line["time"] for line in read_metrics(path) if "time" in line]
    return statistics.median(times) if times else math.nan


def long_budget(runs: Sequence[Run], cfg: CfgNode, output: Path) -> dict:
    """Ratio, iterations and what they come from; measured once, then kept in ``output``/`FILE`.

    It is the time of the main arm, or without it of the slowest arm of a method: then no method
    had more time than the student. Kept, because all seeds must have one schedule, those that are
    added another day too.

    Returns:
        {"arm": whose time it is, "seconds": {arm: s}, "ratio", "iterations", "scheduled"}.
    Raises:
        UserError: no run of one of the arms has finished; or the schedule is not that of the file.
    """
    path, scheduled = output / FILE, int(cfg.SOLVER.MAX_ITER)
    if path.exists():
        budget = read_json(str(path), "budget")
        if not isinstance(budget, dict) or not _KEYS <= budget.keys():
            raise UserError(f"{path}: not what a study writes; delete it to measure the time again")
        if budget["scheduled"] != scheduled:
            raise UserError(
                f"{path}: measured for SOLVER.MAX_ITER {budget['scheduled']}, which is now "
                f"{scheduled}; use another --output"
            )
        return budget
    timed = main_arms(list(dict.fromkeys(run.arm for run in runs)), cfg)
    seconds = {arm: _seconds_of(arm, runs) for arm in (STUDENT, *timed)}
    slowest = max(timed, key=seconds.get)
    # A student is never trained for less than the others, should distillation cost nothing.
    ratio = max(1.0, seconds[slowest] / seconds[STUDENT])
    iterations = math.ceil(scheduled * ratio)
    budget = {
        "arm": slowest,
        "seconds": seconds,
        "ratio": ratio,
        "iterations": iterations,
        "scheduled": scheduled,
    }
    write_json(path, budget)
    return budget


def _seconds_of(arm: str, runs: Sequence[Run]) -> float:
    done = [run.folder for run in runs if run.arm == arm and is_finished(run)]
    seconds = step_seconds(done)
    if math.isnan(seconds):
        raise UserError(f"no finished run of {arm} says how long a step takes")
    return seconds


def long_schedule(budget: dict, cfg: CfgNode) -> Dict[str, str]:
    """Options that train for the budget's iterations."""
    return stretched(cfg, budget["iterations"])


def stretched(cfg: CfgNode, iterations: int) -> Dict[str, str]:
    """Options that stretch the whole schedule: warm-up, steps and phases keep their share of it."""
    stretch = iterations / cfg.SOLVER.MAX_ITER
    steps = tuple(round(step * stretch) for step in cfg.SOLVER.STEPS)
    options = {
        "SOLVER.MAX_ITER": str(iterations),
        "SOLVER.WARMUP_ITERS": str(round(cfg.SOLVER.WARMUP_ITERS * stretch)),
        "SOLVER.STEPS": str(steps),
    }
    if cfg.INPUT.PLAIN_FROM:
        options["INPUT.PLAIN_FROM"] = str(round(cfg.INPUT.PLAIN_FROM * stretch))
    return options
