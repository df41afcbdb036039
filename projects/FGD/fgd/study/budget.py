"""How long arms of equal time train: as long as the main arm does, by times of the same study."""

import math
import statistics
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

from detectron2.config import CfgNode

from fgd_inputs.json_file import read_json

from ..errors import UserError
from ..visualize import read_metrics
from .arms import LONG, STUDENT, TIMED, has_labels, main_arms
from .files import write_json
from .step_times import measure

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


def budget_file(arm: str, output: Path) -> Path:
    return output / f"{arm}.json"


def read_budget(arm: str, cfg: CfgNode, output: Path) -> Optional[dict]:
    """What `equal_time` has kept; None before.

    Raises:
        UserError: the schedule is not that of the file, or this is no such file.
    """
    path, scheduled = budget_file(arm, output), int(cfg.SOLVER.MAX_ITER)
    if not path.exists():
        return None
    budget = read_json(str(path), "budget")
    if not isinstance(budget, dict) or not _KEYS <= budget.keys():
        raise UserError(f"{path}: not what a study writes; delete it to measure the time again")
    if budget["scheduled"] != scheduled:
        raise UserError(
            f"{path}: measured for SOLVER.MAX_ITER {budget['scheduled']}, which is now "
            f"{scheduled}; use another --output"
        )
    return budget


def equal_time(
    arm: str,
    words: Mapping[str, List[str]],
    cfg: CfgNode,
    output: Path,
    threads: int,
    label_seconds: Optional[float] = None,
) -> dict:
    """Ratio and iterations of an arm of `TIMED`; settled once, then kept in ``output``.

    It has the time of the main arm, or without it of the slowest arm of a method: then no method
    had more time than the student. With the time r_M of that arm's step and r_X of this one's, both
    over the student's step of s seconds,

        iterations = (MAX_ITER r_M - label_seconds / s) / r_X,

    rounded up. Kept, because all seeds must have one schedule, also those added another day.

    Args:
        words: arm → what `measure` takes. label_seconds: that it took to make the labels of an arm
            that trains on them; None = unknown.
    Returns:
        {"arm": whose time it is, "seconds": {arm: s of a step}, "ratio": iterations over those of
        all arms, "iterations", "scheduled", "labelling": seconds}.
    Raises:
        UserError: nobody knows how long labelling took, or it took longer than that arm trains; see
            `read_budget` and `measure`.
    """
    budget = read_budget(arm, cfg, output)
    if budget is not None:
        return budget
    base, scheduled = TIMED[arm], int(cfg.SOLVER.MAX_ITER)
    timed = main_arms(list(words), cfg)
    wanted = [name for name in dict.fromkeys((*timed, base)) if name != STUDENT]
    times = measure(output, words, STUDENT, wanted, threads)
    slowest = max(timed, key=lambda name: times[name].ratio)
    taught, student, clock = times[slowest]
    own = 1.0 if base == STUDENT else times[base].ratio
    spent = _labelling(arm, label_seconds) if has_labels(arm) else 0.0
    left = scheduled * taught - spent / clock
    if left < own:
        raise UserError(
            f"{arm}: labelling took {spent:.0f} s, longer than {slowest} trains "
            f"({scheduled * taught * clock:.0f} s), so nothing is left for it"
        )
    ratio = left / own / scheduled
    if arm == LONG:  # never for less than the others, should distillation cost nothing
        ratio = max(1.0, ratio)
    budget = {
        "arm": slowest,
        "seconds": {STUDENT: student, **{name: student * times[name].ratio for name in wanted}},
        "ratio": ratio,
        "iterations": math.ceil(round(scheduled * ratio, 6)),
        "scheduled": scheduled,
        "labelling": spent,
    }
    write_json(budget_file(arm, output), budget)
    return budget


def _labelling(arm: str, seconds: Optional[float]) -> float:
    if seconds is None:
        raise UserError(
            f"{arm}: --labels does not say how long labelling took (info.seconds, of "
            f"deploy/label.py), so its time cannot be counted; take {TIMED[arm]} alone"
        )
    return seconds


def schedule(budget: dict, cfg: CfgNode) -> Dict[str, str]:
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
