"""Where does distillation make the host wait for the GPU? CUDA itself is asked."""

import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Set

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from .goals import REFERENCE
from .gpu_numbers import methods_by_pyramid
from .gpu_pairs import Settings, small_batch, small_pair
from .gpu_report import Row, note, row
from .per_method import record
from .workload import Workload, build_workload

_SIGN = "called a synchronizing CUDA operation"
_HERE = Path(__file__).parent
_PACKAGE = _HERE.parent


def measure(settings: Settings) -> Dict[str, Any]:
    """For each method: waits in a step's forward and backward beyond the student's and the
    teacher's own; for FGD none is the goal. Tiny detectors, in float32: sizes change no count."""
    rows: List[Row] = []
    if torch.device(settings.device).type != "cuda":
        rows.append(note("", "a CPU does not wait: only run through"))
    with tempfile.TemporaryDirectory() as folder:
        for pyramid, methods in methods_by_pyramid().items():
            methods = [REFERENCE] if settings.tiny else methods
            cfg = small_pair(pyramid, settings.device, Path(folder))
            work = build_workload(cfg, (64, 96), 2, 3, methods, variants=False)
            rows += _of_pair(pyramid, work, small_batch(cfg), torch.device(settings.device))
    return {"rows": rows}


def _of_pair(pyramid: str, work: Workload, batch: List[dict], device: torch.device) -> List[Row]:
    student = count(lambda: _step(work.student, batch), device).places
    rows = [row(f"{pyramid}: the student's step", student.total())]
    for name, distiller in work.distillers.items():
        whole = count(lambda model=distiller: _step(model, batch), device)
        own = whole.places - student
        if distiller.teacher is not None:
            own -= count(record(distiller, batch, distiller.teacher), device).places
        goal = 0 if name == REFERENCE else None
        rows.append(row(f"{pyramid}, {name}: waits of its own", own.total(), goal))
        for place, n in own.most_common(8):
            callers = ", ".join(sorted(whole.callers[place]))
            rows.append(note(f"{pyramid}, {name}", f"{n} at {place}, called from {callers}"))
    return rows


def _step(model: nn.Module, batch: List[dict]) -> None:
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()


class Waits(NamedTuple):
    """Of the host for CUDA. A wait in a backward is at the line that asks for the backward.

    Attributes:
        places: innermost line of Python → how often. callers: that line → lines of this project,
            the benchmark apart, from which it was reached.
    """

    places: Counter
    callers: Dict[str, Set[str]]


def count(call: Callable[[], Any], device: torch.device) -> Waits:
    """In a second call: what the first one makes once, such as anchors, does not count."""
    call()
    found = Waits(Counter(), {})

    def show(message, *args, **kwargs) -> None:
        if _SIGN in str(message):
            stack = traceback.extract_stack()[:-1]
            frames = [x for x in stack if x.filename != warnings.__file__]
            place = _name(frames[-1])
            found.places[place] += 1
            outside = [x for x in frames if _is_product(Path(x.filename))]
            found.callers.setdefault(place, set()).update(map(_name, outside[-1:]))

    on_cuda = device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if on_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            if on_cuda:
                torch.cuda.set_sync_debug_mode("default")
    return found


def _is_product(path: Path) -> bool:
    return _PACKAGE in path.parents and _HERE not in path.parents


def _name(frame: traceback.FrameSummary) -> str:
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"
