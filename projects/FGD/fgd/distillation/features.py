"""Which backbone outputs are distilled, and which of the teacher's teaches which."""

from collections import defaultdict
from typing import Dict, List, NamedTuple, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from tabulate import tabulate

from ..errors import UserError

Shapes = Dict[str, ShapeSpec]  # of all outputs of a backbone, by name


class Level(NamedTuple):
    """One distilled level; the loss, its modules and the log go by ``name``."""

    name: str  # of the student's output
    student_channels: int
    teacher_channels: int
    teacher_name: str = ""  # of the teacher's output; "" where no teacher is involved


def distilled_level_names(cfg: CfgNode) -> List[str]:
    """MODEL.DISTILLER.LEVELS, or by default the levels that the student's head reads.

    That is p3-p7 for dense detectors (MODEL.RETINANET.IN_FEATURES and so on) and p2-p5 for R-CNN,
    the levels of the authors' configs. The last one is an FPN output for all: R-CNN's max-pooled
    p6 feeds the RPN only.

    Raises:
        UserError: LEVELS is empty and the student's architecture has no default.
    """
    if cfg.MODEL.DISTILLER.LEVELS:
        return list(cfg.MODEL.DISTILLER.LEVELS)
    student = cfg.MODEL.DISTILLER.STUDENT
    name = "ROI_HEADS" if student == "GeneralizedRCNN" else student.upper()
    node = cfg.MODEL.get(name)
    if not isinstance(node, CfgNode) or "IN_FEATURES" not in node:
        raise UserError(
            f"MODEL.DISTILLER.LEVELS is empty and {student} has no default; name the backbone "
            "outputs to distil, e.g. ['p3', 'p4', 'p5']"
        )
    return list(node.IN_FEATURES)


def parse_level_map(entries: Sequence[str]) -> Dict[str, str]:
    """MODEL.DISTILLER.LEVEL_MAP, "student_level:teacher_level" strings → student's to teacher's.

    Raises:
        UserError: an entry has another form, or two are about one level of the student.
    """
    pairs: Dict[str, str] = {}
    for entry in entries:
        student, _, teacher = str(entry).partition(":")
        if not student or not teacher or ":" in teacher:
            raise UserError(
                f"MODEL.DISTILLER.LEVEL_MAP: {entry!r} is not of the form 'student:teacher', as "
                "['p3:p4']"
            )
        if student in pairs:
            raise UserError(f"MODEL.DISTILLER.LEVEL_MAP names the student's {student!r} twice")
        pairs[student] = teacher
    return pairs


def match_levels(
    names: Sequence[str], student: Shapes, teacher: Shapes, level_map: Sequence[str] = ()
) -> List[Level]:
    """Pair levels of the student with outputs of the teacher: by the map, else by equal stride.

    Channels and names may differ. Strides may not: the loss compares cell with cell.

    Args:
        names: the student's levels to distil. level_map: see `parse_level_map`.
    Raises:
        UserError: a level has no partner or more than one; shows the table of both sides.
    """
    pairs = parse_level_map(level_map)
    problems, found = [], []
    if len(set(names)) < len(names):
        problems.append(f"MODEL.DISTILLER.LEVELS {list(names)} names a level twice")
    for name in pairs.keys() - set(names):
        problems.append(f"MODEL.DISTILLER.LEVEL_MAP names {name!r}, which is not distilled")
    for name in names:
        try:
            partner = _partner(name, pairs.get(name), student, teacher)
        except UserError as error:
            problems.append(str(error))
            continue
        channels = student[name].channels, teacher[partner].channels
        found.append(Level(name, *channels, partner))
    if problems:
        table = level_table(student, teacher, found)
        raise UserError(f"cannot distil: {'; '.join(problems)}.{_advice(found)}\n{table}")
    return found


def _partner(name: str, mapped: str | None, student: Shapes, teacher: Shapes) -> str:
    """The teacher's output for one level; UserError says why there is none."""
    if name not in student:
        raise UserError(f"the student has no level {name!r}")
    stride = student[name].stride
    if mapped is not None:
        if mapped not in teacher:
            raise UserError(f"MODEL.DISTILLER.LEVEL_MAP: the teacher has no level {mapped!r}")
        other = teacher[mapped].stride
        if None not in (stride, other) and stride != other:
            raise UserError(
                f"MODEL.DISTILLER.LEVEL_MAP: the student's {name!r} has stride {stride}, the "
                f"teacher's {mapped!r} {other}"
            )
        return mapped
    by_hand = f"say which with MODEL.DISTILLER.LEVEL_MAP \"['{name}:…']\""
    if stride is None:
        raise UserError(f"the student's {name!r} states no stride to match by; {by_hand}")
    candidates = [x for x, shape in teacher.items() if shape.stride == stride]
    if not candidates:
        raise UserError(f"the teacher has no level of stride {stride} for {name!r}")
    if len(candidates) > 1:
        raise UserError(
            f"the teacher has {len(candidates)} levels of stride {stride} for {name!r}, "
            f"{' and '.join(candidates)}; {by_hand}"
        )
    return candidates[0]


def _advice(found: Sequence[Level]) -> str:
    names = [level.name for level in found]
    return f' Those that match: MODEL.DISTILLER.LEVELS "{names}"' if names else ""


def level_table(student: Shapes, teacher: Shapes, levels: Sequence[Level] = ()) -> str:
    """All outputs of both backbones by stride, with their channels, and what teaches what."""
    by_stride: Dict[int, List[List[str]]] = defaultdict(lambda: [[], [], []])
    for column, shapes in enumerate((student, teacher)):
        for name, shape in shapes.items():
            by_stride[shape.stride or 0][column].append(f"{name} ({shape.channels})")
    for level in levels:
        stride = student[level.name].stride or 0
        by_stride[stride][2].append(f"{level.name} <- {level.teacher_name}")
    rows = [
        [stride or "?", *(", ".join(cell) or "-" for cell in by_stride[stride])]
        for stride in sorted(by_stride)
    ]
    headers = ["stride", "student (channels)", "teacher (channels)", "distilled"]
    return tabulate(rows, headers, disable_numparse=True)
