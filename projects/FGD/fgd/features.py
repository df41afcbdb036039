"""Which backbone outputs are distilled, whether teacher and student fit, and how to record them."""

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from tabulate import tabulate
from torch import Tensor, nn

from .errors import UserError

# Student meta-architecture -> config node whose IN_FEATURES its head reads. Their last level is
# an FPN output for all: R-CNN's max-pooled p6 feeds the RPN only.
_HEAD_NODES = {"RetinaNet": "RETINANET", "FCOS": "FCOS", "GeneralizedRCNN": "ROI_HEADS"}


class Level(NamedTuple):
    """One distilled level: its name in both backbones and the channels on each side."""

    name: str
    student_channels: int
    teacher_channels: int


def distilled_level_names(cfg: CfgNode) -> List[str]:
    """MODEL.DISTILLER.LEVELS, or by default the levels that the student's head reads.

    That is p3-p7 for RetinaNet and FCOS and p2-p5 for R-CNN, the levels of the authors' configs.

    Raises:
        UserError: LEVELS is empty and the student's architecture has no default.
    """
    if cfg.MODEL.DISTILLER.LEVELS:
        return list(cfg.MODEL.DISTILLER.LEVELS)
    student = cfg.MODEL.DISTILLER.STUDENT
    if student not in _HEAD_NODES:
        raise UserError(
            f"MODEL.DISTILLER.LEVELS is empty and {student} has no default; name the backbone "
            "outputs to distil, e.g. ['p3', 'p4', 'p5']"
        )
    return list(cfg.MODEL[_HEAD_NODES[student]].IN_FEATURES)


def match_levels(
    names: Sequence[str], student: Dict[str, ShapeSpec], teacher: Dict[str, ShapeSpec]
) -> List[Level]:
    """Pair the named levels of two backbones; channels may differ, strides may not.

    Raises:
        UserError: a level is missing on one side or strides differ; shows both tables.
    """
    for name in names:
        missing = [who for who, s in (("student", student), ("teacher", teacher)) if name not in s]
        if missing:
            problem = f"level {name!r} is missing in the {' and the '.join(missing)}"
        elif student[name].stride != teacher[name].stride:
            problem = f"level {name!r} has different strides"
        else:
            continue
        raise UserError(f"cannot distil: {problem}\n{level_table(student, teacher)}")
    return [Level(name, student[name].channels, teacher[name].channels) for name in names]


def level_table(student: Dict[str, ShapeSpec], teacher: Dict[str, ShapeSpec]) -> str:
    """Name, stride and channels of every output of both backbones, as text."""
    names = sorted({*student, *teacher}, key=lambda name: (len(name), name))
    shapes = [[s.get(name) for s in (student, teacher)] for name in names]
    rows = [
        [name, *(f"{s.channels} / {s.stride}" if s else "-" for s in pair)]
        for name, pair in zip(names, shapes)
    ]
    return tabulate(rows, headers=["level", "student channels / stride", "teacher"])


class FeatureTap:
    """Records one forward of a backbone and hands it out exactly once."""

    def __init__(self, backbone: nn.Module):
        self._record: Optional[Tuple[Dict[str, Tensor], Tuple[int, int]]] = None
        backbone.register_forward_hook(self._save)

    def _save(self, backbone: nn.Module, args: tuple, output: Dict[str, Tensor]) -> None:
        if backbone.training:  # evaluation must not keep features alive
            self._record = output, tuple(args[0].shape[-2:])

    def pop(self) -> Tuple[Dict[str, Tensor], Tuple[int, int]]:
        """(features by level, padded (height, width) of the batch) of the last training forward.

        Raises:
            RuntimeError: the backbone has not run in training mode since the last call.
        """
        if self._record is None:
            raise RuntimeError("the student's backbone did not run, or its features were taken")
        record, self._record = self._record, None
        return record
