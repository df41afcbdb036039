"""Everything about a GPU in one run: numbers, speed, waiting, a training and its resume.

Each part runs in a process of its own, since a faulty kernel leaves CUDA unusable for all that
follows in its process, or hangs.
"""

import time
import traceback
from concurrent.futures import TimeoutError as OutOfTime
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch

from . import gpu_numbers, gpu_speed, gpu_syncs, gpu_training
from .gpu_pairs import Settings
from .gpu_report import FAILED, SKIPPED, plain, status_of
from .process import run_alone

# Seconds: a part gets no more, so that one that hangs leaves time for others; and none begins with
# less than what a process takes to start.
_MOST, _LEAST = 100, 15
BUDGET = 330.0


class Part(NamedTuple):
    """A title, and ``measure(settings, *args)`` → {"rows": [...], ...}; it can be pickled."""

    title: str
    measure: Callable[..., Dict[str, Any]]
    args: Tuple = ()
    only_cuda: bool = False


PARTS = (
    Part("kernels", gpu_numbers.measure_kernels),
    Part("loss, RetinaNet, float32", gpu_speed.measure_loss, ("retinanet", "float32")),
    Part("loss, R-CNN, float32", gpu_speed.measure_loss, ("rcnn", "float32")),
    Part("host waits", gpu_syncs.measure),
    Part("step, RetinaNet, float32", gpu_speed.measure_step, ("retinanet", False)),
    Part("step, Faster R-CNN, float32", gpu_speed.measure_step, ("rcnn", False)),
    Part("step, RetinaNet, AMP", gpu_speed.measure_step, ("retinanet", True), only_cuda=True),
    Part("step, Faster R-CNN, AMP", gpu_speed.measure_step, ("rcnn", True), only_cuda=True),
    Part("training", gpu_training.measure_training),
    Part("resume", gpu_training.measure_resume, (False,)),
    Part("methods", gpu_numbers.measure_methods),
    Part("resume, deterministic", gpu_training.measure_resume, (True,), only_cuda=True),
    Part("loss, RetinaNet, float16", gpu_speed.measure_loss, ("retinanet", "float16"), True),
    Part("loss, R-CNN, float16", gpu_speed.measure_loss, ("rcnn", "float16"), True),
)


def measure(
    settings: Settings,
    machine: Dict[str, Any],
    budget: float,
    save: Callable[[Dict[str, Any]], Any],
    parts: Tuple[Part, ...] = PARTS,
) -> Dict[str, Any]:
    """Run one part after the other; a part that fails or takes too long costs no other.

    Args:
        budget: seconds, after which no part begins and a running one is ended.
        save: called with the run after each part.
    """
    start, found = time.monotonic(), []
    kind = torch.device(settings.device).type
    run = {"machine": machine, "tiny": settings.tiny, "budget_s": budget, "parts": found}
    for part in parts:
        if part.only_cuda and kind != "cuda":
            continue
        found.append(_run(part, settings, budget - (time.monotonic() - start), budget))
        print(f"{part.title}: {found[-1]['status']}, {found[-1]['seconds']:.0f} s", flush=True)
        save(run)
    return run


def _run(part: Part, settings: Settings, left: float, budget: float) -> Dict[str, Any]:
    result = {"part": part.title, "status": SKIPPED, "seconds": 0.0, "error": "", "rows": []}
    if left < _LEAST:
        result["error"] = f"skipped: the budget of {budget:.0f} s is used up"
        return result
    start, limit = time.monotonic(), min(left, _MOST)
    call: Callable[[], Dict[str, Any]] = partial(part.measure, settings, *part.args)
    try:
        result.update(plain(run_alone(call, limit=limit)))
        result["status"] = status_of(result["rows"])
    except OutOfTime:
        result.update(status=FAILED, error=f"ended after {limit:.0f} s")
    except Exception as error:  # whatever it is: the other parts are worth having
        text = " ".join(str(error).split())[:500]
        result.update(status=FAILED, error=f"{type(error).__name__}: {text}")
        result["traceback"] = _lines(error)
    result["seconds"] = time.monotonic() - start
    return result


def _lines(error: BaseException) -> List[str]:
    return "".join(traceback.format_exception(error)).splitlines()[-60:]
