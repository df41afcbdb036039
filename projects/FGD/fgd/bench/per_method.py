"""What a method adds to a step, and what of the teacher's forward it needs."""

from functools import cached_property, partial
from inspect import ismethod
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ..distillation.distiller import Distiller
from ..distillation.teacher import FrozenTeacher
from ..timing import Times, ratio
from .goals import step_bound, step_goal
from .memory import trace

TEACHER = "teacher forward"


class TeacherForward:
    """What one distillation step asks a frozen teacher, to be asked again without the rest.

    That is whatever the wiring calls: a look at the batch, and what its heads say. ``title`` tells
    apart forwards of other parts, or of more than one look.
    """

    def __init__(self, teacher: FrozenTeacher, calls: List[Tuple[str, Callable[[], Any]]]):
        heads = [name for name in teacher.parts if name != "backbone"]
        looks = [name for name, _ in calls].count("look")
        self.title = TEACHER + (f" with {', '.join(heads)}" if heads else "")
        self.title += f", {looks} looks" if looks > 1 else ""
        self._calls = [call for _, call in calls]

    @torch.no_grad()
    def __call__(self) -> None:
        for call in self._calls:
            compute(call())


def compute(found: Any) -> None:
    """Make everything of a teacher's answer that is made on demand, as what dense heads say is."""
    if isinstance(found, Mapping):
        found = tuple(found.values())
    if isinstance(found, (tuple, list)):
        for part in found:
            compute(part)
    elif not isinstance(found, torch.Tensor):
        for name, kind in vars(type(found)).items():
            if isinstance(kind, (property, cached_property)):
                compute(getattr(found, name))


class _Recorder:
    """Stands for a teacher and keeps the calls of its methods with their arguments."""

    def __init__(self, teacher: FrozenTeacher):
        self.calls: List[Tuple[str, Callable[[], Any]]] = []
        self._teacher = teacher

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._teacher, name)
        if not ismethod(found):
            return found

        def call(*args, **kwargs):
            self.calls.append((name, partial(found, *args, **kwargs)))
            return found(*args, **kwargs)

        return call


@torch.no_grad()
def record(distiller: nn.Module, batch: List[dict], teacher: FrozenTeacher) -> TeacherForward:
    """The forward of ``teacher`` in a step of ``distiller``, its own or one in its place."""
    own, recorder = distiller.teacher, _Recorder(teacher)
    distiller.teacher = recorder
    try:
        with EventStorage():
            _, seen = distiller.run_student(batch)
        distiller.batch(seen, batch)
    finally:
        distiller.teacher = own
    return TeacherForward(teacher, recorder.calls)


class Memory(NamedTuple):
    """Of a training step, in bytes beyond what was allocated before.

    Attributes:
        peak: of the whole step. held: after its forward, for its backward.
        unit: U, the student's maps that are distilled; 0 for a method without maps.
    """

    peak: int
    held: int
    unit: int = 0


def measure_memory(
    step: Callable[[], Any], model: nn.Module, batch: List[dict], amp: bool
) -> Memory:
    """Memory of ``step``, a training step of ``model``.

    Args:
        model: a distiller or a plain student. amp: whether the step autocasts.
    """
    device, units = model.device, []

    def forward() -> Dict[str, torch.Tensor]:
        with EventStorage(), torch.autocast(device.type, torch.float16, enabled=amp):
            return model(batch)

    if isinstance(model, Distiller):
        model.watch = lambda seen: units.append(sum(x.nbytes for x in seen.student.values()))
    found = []
    for work in (step, forward):
        model.zero_grad()
        torch.manual_seed(0)  # R-CNN samples its proposals
        found.append(trace(work, device)[1])
    if isinstance(model, Distiller):
        model.watch = None
    return Memory(found[0].peak, found[1].held, units[-1] if units else 0)


def method_row(
    name: str,
    distiller: nn.Module,
    times: Tuple[Times, Times, Optional[Times]],
    memory: Tuple[Memory, Memory],
) -> Dict[str, Any]:
    """The figures of one method, for people and for step.json.

    Args:
        times: of the student's step, the distillation step, and the teacher's forward, if any.
        memory: of the student's step and the distillation step.
    """
    student, whole, teacher = times
    parts = student.wall if teacher is None else student.wall + teacher.wall
    over_parts = ratio(whole.wall, parts)
    parameters = sum(p.numel() for p in distiller.distillation.parameters() if p.requires_grad)
    bound, reason = step_bound(name, distiller.asked_for, parameters)
    goal = None if bound is None else step_goal(name, bound, over_parts, teacher is not None)
    return {
        "method": name,
        "needs": sorted(distiller.asked_for),
        **whole.summary(),
        "over_parts": over_parts,
        "added_ms": 1e3 * float(np.median(whole.wall - parts)),
        "goal": goal and goal.json(),
        "no_goal": reason,
        **_beyond(*memory),
        "parameters": parameters,
    }


def _beyond(student: Memory, whole: Memory) -> Dict[str, Any]:
    held = whole.held - student.held
    return {
        "peak_over_student_bytes": whole.peak - student.peak,
        "held_bytes": held,
        "unit_bytes": whole.unit,
        "held_u": held / whole.unit if whole.unit else None,
    }
