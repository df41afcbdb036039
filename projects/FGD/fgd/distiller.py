"""The meta-architecture that trains a student under a frozen teacher."""

import logging
from typing import Dict, List

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
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
        teacher: the frozen teacher.
        distillation: a method of `fgd.methods`.
        inheritable: the teacher's neck and head, to be copied by `inherit_from_teacher`, or None.
        summary: one line that says what is distilled from what.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher,
        distillation: nn.Module,
        inheritable: Dict[str, Tensor] | None = None,
        summary: str = "",
    ):
        super().__init__()
        self.student, self.distillation = student, distillation
        self.teacher = teacher
        self.summary = summary
        self._inheritable = inheritable
        self._tap = FeatureTap(student.backbone)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_config(cfg)
        student = build_model(student_config(cfg))
        # Teacher and distillation modules draw random numbers for weights of their own. The
        # student's run must not notice: with all weights at 0 it equals the plain student's.
        with torch.random.fork_rng():
            model, teacher_cfg = build_teacher(cfg)
            names = distilled_level_names(cfg)
            shapes = student.backbone.output_shape(), model.backbone.output_shape()
            levels = match_levels(names, *shapes)
            _check_padding(student.backbone.size_divisibility, model.backbone.size_divisibility)
            method = METHOD_REGISTRY.get(cfg.MODEL.DISTILLER.METHOD)
            distillation = method.from_config(cfg, levels)
        logger.info(f"Levels of student and teacher:\n{level_table(*shapes)}")
        return {
            "student": student,
            "teacher": FrozenTeacher(model, teacher_cfg.INPUT.FORMAT, cfg.INPUT.FORMAT),
            "distillation": distillation,
            "inheritable": neck_and_head(model) if cfg.MODEL.DISTILLER.INHERIT else None,
            "summary": _summary(cfg, teacher_cfg, names),
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
        if not self.training:
            return self.student(batched_inputs)
        losses = self.student(batched_inputs)
        features, padded_size = self._tap.pop()
        teacher_features = self.teacher.features(batched_inputs, padded_size)
        boxes = [x["instances"].gt_boxes.tensor.to(self.device) for x in batched_inputs]
        image_sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        terms = self.distillation(features, teacher_features, boxes, image_sizes, padded_size)
        return {**losses, **terms}


def _check_padding(student: int, teacher: int) -> None:
    if max(student, 1) % max(teacher, 1):  # Detectron2 writes "no constraint" as 0
        raise UserError(
            f"cannot distil: the student pads its batches to multiples of {student} pixels, the "
            f"teacher needs multiples of {teacher}; use backbones with equal size_divisibility"
        )


def _summary(cfg: CfgNode, teacher_cfg: CfgNode, names: List[str]) -> str:
    node = cfg.MODEL.DISTILLER
    settings = ", ".join(
        f"{key.lower()} {value}" for key, value in node.get(node.METHOD, {}).items()
    )
    return (
        f"Distillation is ON: {node.METHOD} on {', '.join(names)}; student {node.STUDENT}, teacher "
        f"{teacher_cfg.MODEL.META_ARCHITECTURE} from {node.TEACHER.WEIGHTS}; {settings}; "
        f"inherit {node.INHERIT}"
    )
