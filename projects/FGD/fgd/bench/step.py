"""Time and memory of a training step: the student alone, the teacher, both with each method."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from ..engine import solver
from ..methods.method import over_levels
from ..timing import Times, alternate, noise, ratio
from .goals import REFERENCE
from .memory import trace
from .per_method import Memory, measure_memory, method_row, record
from .workload import Workload, build_workload

STUDENT, REST, WHOLE = "student step", "the method and the rest", "distillation step"


@dataclass(frozen=True)
class Settings:
    """One measurement.

    Attributes:
        size: (height, width) of the images in pixels. boxes: per image.
        methods: values of MODEL.DISTILLER.METHOD; none for the config's own. `REFERENCE` is
            measured beside them.
        variants: whether to time the teacher in each precision and memory order too; None: where
            one method is asked for.
    """

    size: Tuple[int, int]
    batch: int
    boxes: int
    rounds: int
    threads: int
    methods: Tuple[str, ...] = ()
    variants: Optional[bool] = None

    @property
    def one(self) -> bool:
        """Whether a single method is asked for."""
        return len(set(self.methods)) < 2


class TrainingStep:
    """One step of Detectron2's training loop on the same batch each time.

    Images to the device, forward, backward, clipping, optimizer and logged losses, as
    `fgd.engine.trainer` runs it, AMP included; without loading data. The learning rate is 0, so
    that every step does the same work.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, batch):
        cfg = cfg.clone()
        cfg.SOLVER.BASE_LR = 0.0
        self.optimizer = solver.build_optimizer(cfg, model)
        loop = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self.trainer = loop(model, itertools.repeat(batch), self.optimizer)
        self.trainer.iter = 0

    def __call__(self) -> None:
        with EventStorage():
            self.trainer.run_step()


class Rows(NamedTuple):
    """What is timed.

    Attributes:
        calls: by the name of the row. models: row → what it trains.
        forwards: method → row of the teacher's forward that it needs; none without a teacher.
        variants: precision and channels_last → row of the first method's forward in these.
    """

    calls: Dict[str, Callable[[], None]]
    models: Dict[str, nn.Module]
    forwards: Dict[str, str]
    variants: Dict[Tuple[str, bool], str]


def step_row(method: str) -> str:
    return f"{WHOLE}, {method}"


def plan_rows(work: Workload) -> Rows:
    """The student's step, each kind of teacher forward, each distillation step, each variant."""
    distillers = {step_row(name): distiller for name, distiller in work.distillers.items()}
    models = {STUDENT: work.student, **distillers}
    calls: Dict[str, Callable[[], None]] = {}
    forwards, variants = {}, {}
    for name, distiller in work.distillers.items():
        if distiller.teacher is not None:
            forward = record(distiller, work.batch, distiller.teacher)
            forwards[name] = forward.title
            calls.setdefault(forward.title, forward)
    for name, model in models.items():
        calls[name] = TrainingStep(work.cfg, model, work.batch)
    node = work.cfg.MODEL.DISTILLER.TEACHER
    for variant, teacher in work.teachers.items():
        if variant == (node.PRECISION, node.CHANNELS_LAST):
            variants[variant] = next(iter(forwards.values()))
        else:
            variants[variant] = variant_title(*variant)
            calls[variant_title(*variant)] = record(work.distiller, work.batch, teacher)
    return Rows(calls, models, forwards, variants)


def measure(cfg: CfgNode, settings: Settings, load: Optional[float] = None) -> Dict[str, Any]:
    """Time the parts and each variant of the teacher, alternated, then trace their memory.

    Args:
        load: average before.
    Raises:
        UserError: see `build_workload`.
    """
    torch.set_num_threads(settings.threads)
    variants = settings.one if settings.variants is None else settings.variants
    shape = settings.size, settings.batch, settings.boxes
    work = build_workload(cfg, *shape, settings.methods, REFERENCE, variants)
    rows, device, amp = plan_rows(work), work.student.device, cfg.SOLVER.AMP.ENABLED
    times = alternate(rows.calls, settings.rounds, device)
    memory = {
        name: measure_memory(rows.calls[name], model, work.batch, amp)
        for name, model in rows.models.items()
    }
    methods = [_method(name, work, rows, times, memory) for name in work.distillers]
    first = methods[0]["method"] if settings.one else None
    return {
        "settings": _describe(cfg, settings, device, taught=bool(rows.forwards)),
        "random_weights": work.random,
        "left_out": work.left_out,
        "parts": _parts(first, rows, times, _peaks(rows, memory, device)),
        "over_parts": methods[0]["over_parts"] if settings.one else None,
        "goals": [row["goal"] for row in methods if row["goal"]],
        "methods": methods,
        "teachers": _teachers({v: times[row] for v, row in rows.variants.items()}, work),
        "noise": noise(times, load, settings.threads, on_cpu=device.type == "cpu"),
    }


def _describe(
    cfg: CfgNode, settings: Settings, device: torch.device, taught: bool
) -> Dict[str, Any]:
    node, own = cfg.MODEL.DISTILLER, asdict(settings)
    return {
        "student": node.STUDENT,
        "teacher": _teacher_name(node.TEACHER) if taught else "none",
        **{key: own[key] for key in ("size", "batch", "boxes", "rounds", "threads")},
        "device": str(device),
        "amp": cfg.SOLVER.AMP.ENABLED,
    }


def _teacher_name(node: CfgNode) -> str:
    return node.CONFIG_FILE or node.TIMM or node.WEIGHTS


def _method(
    name: str, work: Workload, rows: Rows, times: Dict[str, Times], memory: Dict[str, Memory]
) -> Dict[str, Any]:
    own = step_row(name)
    taught = times[rows.forwards[name]] if name in rows.forwards else None
    costs = memory[STUDENT], memory[own]
    return method_row(name, work.distillers[name], (times[STUDENT], times[own], taught), costs)


def _peaks(rows: Rows, memory: Dict[str, Memory], device: torch.device) -> Dict[str, int]:
    """Of each step and of each teacher forward, in bytes."""
    peaks = {name: own.peak for name, own in memory.items()}
    for name in {*rows.forwards.values()}:
        peaks[name] = trace(rows.calls[name], device)[1].peak
    return peaks


def _parts(
    method: Optional[str], rows: Rows, times: Dict[str, Times], peaks: Dict[str, int]
) -> List[Dict[str, Any]]:
    """Figures of the student and of each teacher forward.

    With a method: of the forward that this one needs, of its step, and of what that has beyond the
    other two.
    """
    forwards = [row for name, row in rows.forwards.items() if method in (None, name)]
    found = {name: times[name] for name in (STUDENT, *forwards)}
    whole = None
    if method is not None:
        step = times[step_row(method)]
        whole, beyond = step.wall, step.wall - sum(part.wall for part in found.values())
        found.update({REST: Times(beyond, beyond), WHOLE: step})
        peaks = {**peaks, WHOLE: peaks[step_row(method)]}
    return [
        {
            "part": name,
            **part.summary(),
            "share": None if whole is None else ratio(part.wall, whole),
            "peak_bytes": peaks.get(name),
        }
        for name, part in found.items()
    ]


def _teachers(times: Dict[tuple, Times], work: Workload) -> List[Dict[str, Any]]:
    if not times:
        return []
    exact, changes = times["float32", False].wall, term_changes(work)
    return [
        {
            "precision": variant[0],
            "channels_last": variant[1],
            **times[variant].summary(),
            "over_float32": ratio(times[variant].wall, exact),
            "change": changes[variant],
        }
        for variant in times
    ]


@torch.no_grad()
def term_changes(work: Workload) -> Dict[tuple, Dict[str, Optional[float]]]:
    """By teacher variant: each term of the method over that with the float32 teacher, minus 1.

    None for a term that is 0 with the float32 teacher, and for a teacher with random weights: its
    features hang on rounding as no trained network's do.
    """
    names = [name.removeprefix("loss_") for name in work.distiller.distillation.loss_names]
    if "teacher" in work.random:
        return {variant: dict.fromkeys(names) for variant in work.teachers}
    with EventStorage():
        _, seen = work.distiller.run_student(work.batch)
    own = work.distiller.teacher

    def terms(teacher) -> Dict[str, float]:
        work.distiller.teacher = teacher
        losses = over_levels(work.distiller.terms(work.distiller.batch(seen, work.batch)))
        return {name: losses[name].item() for name in names}

    values = {variant: terms(teacher) for variant, teacher in work.teachers.items()}
    work.distiller.teacher = own
    exact = values["float32", False]
    return {
        variant: {k: v / exact[k] - 1 if exact[k] else None for k, v in own.items()}
        for variant, own in values.items()
    }


def variant_title(precision: str, channels_last: bool) -> str:
    return f"teacher {precision}{' channels_last' if channels_last else ''}"
