"""The meta-architecture that trains a student under a frozen teacher."""

import logging
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_model
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config import check_config, student_config
from ..errors import UserError
from .features import Level, distilled_level_names, level_table, match_levels
from .inherit import inherit, neck_and_head
from .methods import METHOD_REGISTRY
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

    ``factor`` is what the terms of the last training step were multiplied by.

    Args:
        student: a Detectron2 detector with a ``backbone``.
        teacher, distillation: the frozen teacher and a method of METHOD_REGISTRY; both None when
            the student only inherits (MODEL.DISTILLER.METHOD "").
        inheritable: the teacher's neck and head, to be copied by `inherit_from_teacher`, or None.
        sources: what is distilled of the student's backbone; None = all its outputs.
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
        schedule: Schedule = ALWAYS,
        summary: str = "",
    ):
        super().__init__()
        self.student, self.distillation = student, distillation
        self.teacher = teacher
        self.summary = summary
        self._inheritable = inheritable
        self.sources, self.schedule = sources, schedule
        self.factor = 0.0
        if distillation is not None:
            self._tap = FeatureTap(student.backbone, sources)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_config(cfg)
        student = build_model(student_config(cfg))
        # Teacher and distillation modules draw random numbers for weights of their own. The
        # student's run must not notice: with all weights at 0 it equals the plain student's.
        with torch.random.fork_rng():
            model, teacher_cfg = build_teacher(cfg)
            plan = _plan(cfg, student.backbone, model.backbone)
        inheritable = neck_and_head(model) if cfg.MODEL.DISTILLER.INHERIT else None
        node = cfg.MODEL.DISTILLER.TEACHER
        formats = teacher_cfg.INPUT.FORMAT, cfg.INPUT.FORMAT
        options = node.PRECISION, node.CHANNELS_LAST, plan.teacher_sources
        teacher = FrozenTeacher(model, *formats, *options)
        return {
            "student": student,
            "teacher": teacher if plan.method is not None else None,
            "distillation": plan.method,
            "inheritable": inheritable,
            "sources": plan.sources,
            "schedule": schedule_from_config(cfg),
            "summary": _summary(cfg, teacher_cfg, plan.levels),
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
        self.factor = self.schedule.value(get_event_storage().iter)
        if self.factor == 0:
            return {**losses, **self._nothing(features)}
        terms = self.terms(features, batched_inputs, padded_size)
        if self.factor != 1:
            terms = {name: self.factor * value for name, value in terms.items()}
        return {**losses, **terms}

    def terms(
        self, features: Features, batched_inputs: List[dict], padded_size: Tuple[int, int]
    ) -> Dict[str, Tensor]:
        """The method's weighted scalars, before the schedule's factor.

        Args:
            features: of the student, for a batch padded to (height, width) ``padded_size``.
            batched_inputs: mapped dataset dicts with instances.
        Raises:
            UserError: the grids of a level differ between student and teacher.
        """
        taught = self.teacher.features(batched_inputs, padded_size)
        self._check_grids(features, taught, padded_size)
        boxes = [x["instances"].gt_boxes.tensor.to(self.device) for x in batched_inputs]
        image_sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        return self.distillation(features, taught, boxes, image_sizes, padded_size)

    def _check_grids(
        self, student: Features, taught: Features, padded_size: Tuple[int, int]
    ) -> None:
        for name in student.keys() & taught.keys():
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

    def _nothing(self, features: Features) -> Dict[str, Tensor]:
        """The method's losses at factor 0, without a teacher's forward.

        Zeros that everything trained takes part in: DistributedDataParallel waits for the gradient
        of each parameter, also of those that only distillation reaches.
        """
        self.distillation.level_totals = {}
        parts = (*self.distillation.parameters(), *features.values())
        zero = sum(0.0 * part[(0,) * part.dim()].float() for part in parts)
        return dict.fromkeys(self.distillation.loss_names, zero)


class _Plan(NamedTuple):
    """What is distilled from what; nothing by default."""

    method: Optional[nn.Module] = None
    levels: Sequence[Level] = ()
    sources: Optional[Sources] = None
    teacher_sources: Optional[Sources] = None


def _plan(cfg: CfgNode, student: Backbone, teacher: Backbone) -> _Plan:
    """The method over pairs of levels, and where their tensors are; logs both."""
    node = cfg.MODEL.DISTILLER
    if not node.METHOD:
        return _Plan()
    shapes = student.output_shape(), teacher.output_shape()
    levels = match_levels(distilled_level_names(cfg), *shapes, node.LEVEL_MAP)
    logger.info(f"Levels of student and teacher:\n{level_table(*shapes, levels)}")
    # Detectron2 writes "no constraint" as 0.
    if max(student.size_divisibility, 1) % max(teacher.size_divisibility, 1):
        raise UserError(
            f"cannot distil: the student pads its batches to multiples of "
            f"{student.size_divisibility} pixels, the teacher needs multiples of "
            f"{teacher.size_divisibility}; use backbones with equal size_divisibility"
        )
    partners = {level.name: level.teacher_name for level in levels}
    sources = choose_sources(node.FEATURES, student, teacher, partners)
    for who, side in zip(("student", "teacher"), sources):
        logger.info(f"Distilled features of the {who}: {describe_sources(side)}")
    method = METHOD_REGISTRY.get(node.METHOD).from_config(cfg, levels)
    return _Plan(method, levels, *sources)


def _summary(cfg: CfgNode, teacher_cfg: CfgNode, levels: Sequence[Level]) -> str:
    node = cfg.MODEL.DISTILLER
    teacher = (
        f"teacher {teacher_cfg.MODEL.META_ARCHITECTURE} from {node.TEACHER.WEIGHTS} in "
        f"{node.TEACHER.PRECISION}"
    )
    if not node.METHOD:
        return f"Distillation is OFF: student {node.STUDENT} only inherits from {teacher}"
    settings = ", ".join(f"{k.lower()} {v}" for k, v in node.get(node.METHOD, {}).items())
    return (
        f"Distillation is ON: {node.METHOD} on {', '.join(x.name for x in levels)}; student "
        f"{node.STUDENT}, {teacher}; {settings}; {schedule_from_config(cfg).describe()}; inherit "
        f"{node.INHERIT}"
    )
