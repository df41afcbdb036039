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

from ..errors import in_one_line
from ..processes.alone import run_alone
from . import gpu_numbers, gpu_speed, gpu_syncs, gpu_training
from .gpu_pairs import Settings
from .gpu_report import FAILED, SKIPPED, plain, status_of

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


_NAMES = {"retinanet": "RetinaNet", "rcnn": "R-CNN"}


def _losses(implementation: str, dtype: str = "float32", only_cuda: bool = True) -> List[Part]:
    return [
        Part(
            f"loss, {title}, {dtype}, {implementation}",
            gpu_speed.measure_loss,
            (pyramid, dtype, implementation),
            only_cuda,
        )
        for pyramid, title in _NAMES.items()
    ]


def _steps(amp: bool) -> List[Part]:
    kind = "AMP" if amp else "float32"
    return [
        Part(f"step, {title}, {kind}", gpu_speed.measure_step, (pyramid, amp), only_cuda=amp)
        for pyramid, title in _NAMES.items()
    ]


# What trains by default comes first; the kernels have parts of their own, which may hang.
PARTS = (
    Part("kernels, torch", gpu_numbers.measure_kernels, ("torch",)),
    *_losses("torch", only_cuda=False),
    Part("host waits", gpu_syncs.measure),
    *_steps(amp=False),
    Part("kernels, triton", gpu_numbers.measure_kernels, ("triton",), only_cuda=True),
    *_losses("triton"),
    *_steps(amp=True),
    Part("training", gpu_training.measure_training),
    Part("resume", gpu_training.measure_resume, (False,)),
    Part("methods", gpu_numbers.measure_methods),
    Part("resume, deterministic", gpu_training.measure_resume, (True,), only_cuda=True),
    *_losses("torch", "float16"),
    *_losses("triton", "float16"),
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
    used_up = f"the budget of {budget:.0f} s is used up"
    if left < _LEAST:
        result["error"] = f"skipped: {used_up}"
        return result
    start, limit = time.monotonic(), min(left, _MOST)
    call: Callable[[], Dict[str, Any]] = partial(part.measure, settings, *part.args)
    try:
        result.update(plain(run_alone(call, limit=limit)))
        result["status"] = status_of(result["rows"])
    except OutOfTime:
        if left < _MOST:  # it may well have had nothing wrong
            result["error"] = f"ended after {limit:.0f} s: {used_up}"
        else:
            result.update(status=FAILED, error=f"ended after {limit:.0f} s")
    except Exception as error:  # whatever it is: the other parts are worth having
        result.update(status=FAILED, error=in_one_line(error, 500))
        result["traceback"] = _lines(error)
    result["seconds"] = time.monotonic() - start
    return result


def _lines(error: BaseException) -> List[str]:
    return "".join(traceback.format_exception(error)).splitlines()[-60:]
