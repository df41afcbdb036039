"""The meta-architecture that trains a student under a frozen teacher."""

import logging
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config import student_config
from ..errors import UserError
from ..methods.batch import Batch, Level
from ..methods.method import Method, Table, build_method, over_levels
from .config import asked_for, check_distiller
from .inherit import inherit, neck_and_head
from .levels import Outputs, level_table, plan_levels
from .schedule import ALWAYS, Schedule, schedule_from_config
from .taps import FeatureTap, Source, Sources, choose_sources, describe_sources, read_levels
from .teacher import FrozenTeacher, build_teacher

logger = logging.getLogger(__name__)

Features = Dict[str, Tensor]  # by the student's level


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """Trains ``student`` with its own losses plus a method's; in eval mode it is the student.

    ``student`` and ``distillation`` are trained; the teacher is not a submodule (see
    `FrozenTeacher`). Checkpoints are written from ``student`` (see `fgd.engine.checkpoint`).

    ``factor`` is what the terms of the last training step were multiplied by, ``table`` those
    terms before it, level by level and detached; {} after a step with factor 0. ``seed`` is what
    a method's random numbers are made from. ``watch``, if set, is called with each batch that the
    method is given.

    Args:
        student: a Detectron2 detector with a ``backbone``.
        teacher: None for a method that needs none, and where the student only inherits.
        distillation: a method of METHOD_REGISTRY or a sum of several; None where the student only
            inherits (MODEL.DISTILLER.METHOD "").
        inheritable: the teacher's neck and head, to be copied by `inherit_from_teacher`, or None.
        sources: what is distilled of the student's backbone; None = all its outputs.
        same_grid: levels whose cells are compared with the teacher's; None = all.
        schedule: the common factor on the method's terms, by iteration.
        summary: one line that says what is distilled from what.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Optional[FrozenTeacher],
        distillation: Optional[nn.Module],
        inheritable: Optional[Dict[str, Tensor]] = None,
        sources: Optional[Sources] = None,
        same_grid: Optional[Sequence[str]] = None,
        schedule: Schedule = ALWAYS,
        summary: str = "",
    ):
        super().__init__()
        self.student, self.distillation = student, distillation
        self.teacher = teacher
        self.summary = summary
        self._inheritable = inheritable
        self.sources, self.schedule = sources, schedule
        self._same_grid = same_grid
        self.factor, self.seed = 0.0, 0
        self.table: Dict[str, Dict[str, Tensor]] = {}
        self.watch: Optional[Callable[[Batch], None]] = None
        if distillation is not None:
            self._tap = FeatureTap(student.backbone, sources)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_distiller(cfg)
        student = build_model(student_config(cfg))
        # Teacher and distillation modules draw random numbers for weights of their own. The
        # student's run must not notice: with all weights at 0 it equals the plain student's.
        with torch.random.fork_rng():
            model, teacher_cfg = build_teacher(cfg)
            plan = _plan(cfg, student.backbone, model and model.backbone)
        inheritable = neck_and_head(model) if cfg.MODEL.DISTILLER.INHERIT else None
        return {
            "student": student,
            "teacher": _freeze(cfg, model, teacher_cfg, plan),
            "distillation": plan.method,
            "inheritable": inheritable,
            "sources": plan.sources,
            "same_grid": plan.same_grid,
            "schedule": schedule_from_config(cfg),
            "summary": _summary(cfg, teacher_cfg, plan),
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    def inherit_from_teacher(self) -> None:
        """Copy the teacher's neck and head, once, if MODEL.DISTILLER.INHERIT asks for it.

        The trainer calls this after the student's own weights are loaded, and not on ``--resume``.
        """
        if self._inheritable is not None:
            logger.info(f"Inherited from the teacher:\n{inherit(self.student, self._inheritable)}")
            self._inheritable = None

    def describe(self) -> str:
        """One line for the log: is distillation on, and with what."""
        return self.summary

    def forward(self, batched_inputs: List[dict]):
        """Training: dict of named scalar losses. Inference: the student's list[dict]."""
        if not self.training or self.distillation is None:
            return self.student(batched_inputs)
        losses = self.student(batched_inputs)
        features, padded_size = self._tap.pop()
        iteration = get_event_storage().iter
        self.factor, self.table = self.schedule.value(iteration), {}
        if self.factor == 0:
            zero = _zero(*self.distillation.parameters(), *features.values())
            return {**losses, **dict.fromkeys(self.distillation.loss_names, zero)}
        batch = self.batch(features, batched_inputs, padded_size, iteration)
        return {**losses, **self._sum(self.terms(batch))}

    def batch(
        self,
        features: Features,
        batched_inputs: List[dict],
        padded_size: Tuple[int, int],
        iteration: int = 0,
    ) -> Batch:
        """What the method is given; runs the teacher.

        Args:
            features: of the student, for a batch padded to (height, width) ``padded_size``.
            batched_inputs: mapped dataset dicts with instances.
        Raises:
            UserError: the grids of a level differ between student and teacher.
        """
        taught = self.teacher.features(batched_inputs, padded_size) if self.teacher else {}
        self._check_grids(features, taught, padded_size)
        return Batch(
            student=features,
            teacher=taught,
            instances=[x["instances"].to(self.device) for x in batched_inputs],
            image_sizes=[tuple(x["image"].shape[-2:]) for x in batched_inputs],
            padded_size=padded_size,
            iteration=iteration,
            seed=self.seed,
            rank=comm.get_rank(),
        )

    def terms(self, batch: Batch) -> Table:
        """The method's weighted scalars by level, before the schedule's factor; fills ``table``."""
        if self.watch is not None:
            self.watch(batch)
        with torch.autocast(self.device.type, enabled=False):
            found = self.distillation.table(batch)
        self.table = {
            level: {name: value.detach() for name, value in terms.items()}
            for level, terms in found.items()
        }
        return found

    def _sum(self, table: Table) -> Dict[str, Tensor]:
        """Each term over all levels times the factor; 0 where a batch has none."""
        zero = _zero(*self.distillation.parameters())
        losses = {f"loss_{name}": value for name, value in over_levels(table).items()}
        if self.factor != 1:
            losses = {name: self.factor * value for name, value in losses.items()}
        return {name: losses.get(name, 0.0) + zero for name in self.distillation.loss_names}

    def _check_grids(
        self, student: Features, taught: Features, padded_size: Tuple[int, int]
    ) -> None:
        for name in student.keys() & taught.keys():
            if self._same_grid is not None and name not in self._same_grid:
                continue
            own, other = ("x".join(map(str, x[name].shape[-2:])) for x in (student, taught))
            if own != other:
                partner = (self.teacher.sources or {}).get(name, Source(name)).output
                raise UserError(
                    f"cannot distil {name!r}: in a batch padded to {padded_size[0]}x"
                    f"{padded_size[1]} pixels the student's {name!r} has a grid of {own} cells, "
                    f"the teacher's {partner!r} one of {other}; choose another with "
                    "MODEL.DISTILLER.LEVEL_MAP, or leave the level out with MODEL.DISTILLER.LEVELS"
                )

    def read_student(self, batched_inputs: List[dict]) -> Tuple[Features, Tuple[int, int]]:
        """The student's distilled features in its present mode, and the padded (height, width)."""
        images = self.student.preprocess_image(batched_inputs).tensor
        return read_levels(self.student.backbone, images, self.sources), tuple(images.shape[-2:])


def _zero(*parts: Tensor) -> Tensor:
    """0 that every part takes part in.

    DistributedDataParallel waits for the gradient of each parameter, also of those that only
    distillation reaches, at factor 0 or in a batch without objects.
    """
    return sum((0.0 * part[(0,) * part.dim()].float() for part in parts), torch.zeros(()))


class _Plan(NamedTuple):
    """What is distilled from what; nothing by default."""

    method: Optional[nn.Module] = None
    levels: Dict[Type[Method], List[Level]] = {}
    sources: Optional[Sources] = None
    teacher_sources: Optional[Sources] = None
    same_grid: Sequence[str] = ()


def _plan(cfg: CfgNode, student: Backbone, teacher: Optional[Backbone]) -> _Plan:
    """The method over pairs of levels, and where their tensors are; logs both."""
    if not cfg.MODEL.DISTILLER.METHOD:
        return _Plan()
    outputs = Outputs.of(student), teacher and Outputs.of(teacher)
    levels = plan_levels(cfg, *outputs)
    method = build_method(cfg, levels)
    merged = {level.name: level for own in levels.values() for level in own}
    if not merged:
        return _Plan(method, levels, {}, {})
    partners = {name: level.teacher_name for name, level in merged.items()}
    log_levels(outputs, list(merged.values()))
    _check_padding(student, teacher)
    sources = choose_sources(cfg.MODEL.DISTILLER.FEATURES, student, teacher, partners)
    for who, side in zip(("student", "teacher"), sources):
        logger.info(f"Distilled features of the {who}: {describe_sources(side)}")
    same_grid = [x.name for cls, own in levels.items() if cls.same_grid for x in own]
    return _Plan(method, levels, *sources, same_grid)


def log_levels(outputs: Tuple[Outputs, Outputs], levels: Sequence[Level]) -> None:
    """Tables of what teaches what: of the pyramids, and of the stages below where they teach."""
    student, teacher = outputs
    of_stages = [level for level in levels if level.name in student.stages]
    of_levels = [level for level in levels if level not in of_stages]
    table = level_table(student.levels, teacher.levels, of_levels)
    if of_stages:
        theirs = teacher.stages or teacher.levels
        table += f"\n{level_table(student.stages, theirs, of_stages)}"
    logger.info(f"Levels of student and teacher:\n{table}")


def _check_padding(student: Backbone, teacher: Backbone) -> None:
    # Detectron2 writes "no constraint" as 0.
    if max(student.size_divisibility, 1) % max(teacher.size_divisibility, 1):
        raise UserError(
            f"cannot distil: the student pads its batches to multiples of "
            f"{student.size_divisibility} pixels, the teacher needs multiples of "
            f"{teacher.size_divisibility}; use backbones with equal size_divisibility"
        )


def _freeze(
    cfg: CfgNode, model: Optional[nn.Module], teacher_cfg: Optional[CfgNode], plan: _Plan
) -> Optional[FrozenTeacher]:
    """The teacher as the methods need it; None if none of them needs one."""
    if "teacher" not in asked_for(cfg):
        return None
    node = cfg.MODEL.DISTILLER.TEACHER
    formats = teacher_cfg.INPUT.FORMAT, cfg.INPUT.FORMAT
    return FrozenTeacher(model, *formats, node.PRECISION, node.CHANNELS_LAST, plan.teacher_sources)


def _summary(cfg: CfgNode, teacher_cfg: Optional[CfgNode], plan: _Plan) -> str:
    node = cfg.MODEL.DISTILLER
    teacher = "no teacher"
    if teacher_cfg is not None:
        teacher = (
            f"teacher {teacher_cfg.MODEL.META_ARCHITECTURE} from {node.TEACHER.WEIGHTS} in "
            f"{node.TEACHER.PRECISION}"
        )
    if not node.METHOD:
        return f"Distillation is OFF: student {node.STUDENT} only inherits from {teacher}"
    parts = []
    for method, levels in plan.levels.items():
        where = f" on {', '.join(x.name for x in levels)}" if levels else ""
        settings = ", ".join(f"{k.lower()} {v}" for k, v in method.node(cfg).items())
        parts.append(f"{method.__name__}{where} ({settings})")
    return (
        f"Distillation is ON: {' and '.join(parts)}; student {node.STUDENT}, {teacher}; "
        f"{schedule_from_config(cfg).describe()}; inherit {node.INHERIT}"
    )
