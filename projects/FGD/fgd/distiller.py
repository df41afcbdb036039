"""The meta-architecture that trains a student under a frozen teacher."""

import logging
from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_model
from torch import Tensor, nn

from .config import check_config, student_config
from .errors import UserError
from .features import FeatureTap, distilled_level_names, level_table, match_levels
from .inherit import inherit, neck_and_head
from .methods import METHOD_REGISTRY
from .teacher import FrozenTeacher, build_teacher

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """Trains ``student`` with its own losses plus a method's; in eval mode it is the student.

    ``student`` and ``distillation`` are trained; the teacher is not a submodule (see
    `FrozenTeacher`). Checkpoints are written from ``student`` (see `fgd.checkpoint`).

    Args:
        student: a Detectron2 detector with a ``backbone``.
        teacher, distillation: the frozen teacher and a method of `fgd.methods`; both None when the
            student only inherits (MODEL.DISTILLER.METHOD "").
        inheritable: the teacher's neck and head, to be copied by `inherit_from_teacher`, or None.
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
        summary: str = "",
    ):
        super().__init__()
        self.student, self.distillation = student, distillation
        self.teacher = teacher
        self.summary = summary
        self._inheritable = inheritable
        if distillation is not None:
            self._tap = FeatureTap(student.backbone)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_config(cfg)
        student = build_model(student_config(cfg))
        # Teacher and distillation modules draw random numbers for weights of their own. The
        # student's run must not notice: with all weights at 0 it equals the plain student's.
        with torch.random.fork_rng():
            model, teacher_cfg = build_teacher(cfg)
            distillation = _build_method(cfg, student.backbone, model.backbone)
        inheritable = neck_and_head(model) if cfg.MODEL.DISTILLER.INHERIT else None
        node = cfg.MODEL.DISTILLER.TEACHER
        formats = teacher_cfg.INPUT.FORMAT, cfg.INPUT.FORMAT
        teacher = FrozenTeacher(model, *formats, node.PRECISION, node.CHANNELS_LAST)
        return {
            "student": student,
            "teacher": teacher if distillation is not None else None,
            "distillation": distillation,
            "inheritable": inheritable,
            "summary": _summary(cfg, teacher_cfg),
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
        teacher_features = self.teacher.features(batched_inputs, padded_size)
        boxes = [x["instances"].gt_boxes.tensor.to(self.device) for x in batched_inputs]
        image_sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        terms = self.distillation(features, teacher_features, boxes, image_sizes, padded_size)
        return {**losses, **terms}


def _build_method(cfg: CfgNode, student: Backbone, teacher: Backbone) -> Optional[nn.Module]:
    """The method over the levels that both backbones share; None for METHOD ""."""
    if not cfg.MODEL.DISTILLER.METHOD:
        return None
    shapes = student.output_shape(), teacher.output_shape()
    levels = match_levels(distilled_level_names(cfg), *shapes)
    logger.info(f"Levels of student and teacher:\n{level_table(*shapes)}")
    # Detectron2 writes "no constraint" as 0.
    if max(student.size_divisibility, 1) % max(teacher.size_divisibility, 1):
        raise UserError(
            f"cannot distil: the student pads its batches to multiples of "
            f"{student.size_divisibility} pixels, the teacher needs multiples of "
            f"{teacher.size_divisibility}; use backbones with equal size_divisibility"
        )
    return METHOD_REGISTRY.get(cfg.MODEL.DISTILLER.METHOD).from_config(cfg, levels)


def _summary(cfg: CfgNode, teacher_cfg: CfgNode) -> str:
    node = cfg.MODEL.DISTILLER
    teacher = (
        f"teacher {teacher_cfg.MODEL.META_ARCHITECTURE} from {node.TEACHER.WEIGHTS} in "
        f"{node.TEACHER.PRECISION}"
    )
    if not node.METHOD:
        return f"Distillation is OFF: student {node.STUDENT} only inherits from {teacher}"
    settings = ", ".join(f"{k.lower()} {v}" for k, v in node.get(node.METHOD, {}).items())
    return (
        f"Distillation is ON: {node.METHOD} on {', '.join(distilled_level_names(cfg))}; student "
        f"{node.STUDENT}, {teacher}; {settings}; inherit {node.INHERIT}"
    )
