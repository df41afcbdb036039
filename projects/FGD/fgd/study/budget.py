"""How long `student-long` trains: as long as distillation took, by the clock of the same study."""

import json
import math
import statistics
from pathlib import Path
from typing import Dict, List, Sequence

from detectron2.config import CfgNode

from ..errors import UserError
from ..visualize import read_metrics
from .arms import LONG, STUDENT, Run, main_arm
from .files import write_json

FILE = f"{LONG}.json"


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

    Kept, because all seeds must have one schedule, those that are added another day too.

    Returns:
        {"arm", "seconds": {arm: s}, "ratio", "iterations", "scheduled"}.
    Raises:
        UserError: no run of one of the arms has finished; or the schedule is not that of the file.
    """
    path, scheduled = output / FILE, int(cfg.SOLVER.MAX_ITER)
    if path.exists():
        budget = json.loads(path.read_text())
        if budget["scheduled"] != scheduled:
            raise UserError(
                f"{path}: measured for SOLVER.MAX_ITER {budget['scheduled']}, which is now "
                f"{scheduled}; use another --output"
            )
        return budget
    seconds = {}
    for arm in (STUDENT, main_arm(cfg)):
        done = [r.folder for r in runs if r.arm == arm and (r.folder / "results.json").exists()]
        seconds[arm] = step_seconds(done)
        if math.isnan(seconds[arm]):
            raise UserError(f"no finished run of {arm} says how long a step takes")
    # A student is never trained for less than the others, should distillation cost nothing.
    ratio = max(1.0, seconds[main_arm(cfg)] / seconds[STUDENT])
    iterations = math.ceil(scheduled * ratio)
    budget = {
        "arm": main_arm(cfg),
        "seconds": seconds,
        "ratio": ratio,
        "iterations": iterations,
        "scheduled": scheduled,
    }
    write_json(path, budget)
    return budget


def long_schedule(budget: dict, cfg: CfgNode) -> Dict[str, str]:
    """Options that stretch the whole schedule: warm-up, steps and phases keep their share of it."""
    stretch = budget["iterations"] / budget["scheduled"]
    steps = tuple(round(step * stretch) for step in cfg.SOLVER.STEPS)
    options = {
        "SOLVER.MAX_ITER": str(budget["iterations"]),
        "SOLVER.WARMUP_ITERS": str(round(cfg.SOLVER.WARMUP_ITERS * stretch)),
        "SOLVER.STEPS": str(steps),
    }
    if cfg.INPUT.PLAIN_FROM:
        options["INPUT.PLAIN_FROM"] = str(round(cfg.INPUT.PLAIN_FROM * stretch))
    return options
