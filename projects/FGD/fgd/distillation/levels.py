"""Which backbone outputs are distilled, and which of the teacher's teaches which."""

from collections import defaultdict
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Type

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from tabulate import tabulate

from ..errors import UserError
from ..methods.batch import Level
from ..methods.method import Method, chosen_methods

Shapes = Dict[str, ShapeSpec]  # by name


class Outputs(NamedTuple):
    """What of a backbone can be distilled."""

    levels: Shapes  # its outputs
    stages: Shapes  # those of its bottom-up network; {} if it has none

    @classmethod
    def of(cls, backbone: Backbone) -> "Outputs":
        body = getattr(backbone, "bottom_up", None)
        stages = body.output_shape() if isinstance(body, Backbone) else {}
        levels = backbone.output_shape()
        return cls(levels, {k: v for k, v in stages.items() if k not in levels})

    def finest_first(self) -> List[str]:
        """Names of the stages."""
        return _finest_first(self.stages, self.stages)


def plan_levels(
    cfg: CfgNode, student: Outputs, teacher: Optional[Outputs]
) -> Dict[Type[Method], List[Level]]:
    """The levels of each chosen method, in order.

    Args:
        teacher: None where no method needs one.
    Raises:
        UserError: as `match_levels`; or two methods want different partners for one level.
    """
    plan = {method: _method_levels(method, cfg, student, teacher) for method in chosen_methods(cfg)}
    partners: Dict[str, str] = {}
    for method, levels in plan.items():
        for level in (x for x in levels if x.teacher_name):
            if partners.setdefault(level.name, level.teacher_name) != level.teacher_name:
                raise UserError(
                    f"MODEL.DISTILLER.METHOD {cfg.MODEL.DISTILLER.METHOD}: {method.__name__} wants "
                    f"{level.name!r} from {level.teacher_name!r}, another method from "
                    f"{partners[level.name]!r}; use one of them, or one pairing for both"
                )
    return plan


def _method_levels(
    method: Type[Method], cfg: CfgNode, student: Outputs, teacher: Optional[Outputs]
) -> List[Level]:
    """Levels of the pyramid, and stages of the bottom-up network, each against their like."""
    names = level_names(method, cfg, student)
    node = method.node(cfg)
    if not {"teacher", "maps"} <= method.needs_of(node) or teacher is None:
        shapes = {**student.stages, **student.levels}
        for name in names:
            if name not in shapes:
                raise UserError(
                    f"MODEL.DISTILLER.LEVELS: the student has no level {name!r}; it has "
                    f"{', '.join(shapes)}"
                )
        return [
            Level(k, shapes[k].channels, 0, "", shapes[k].stride or 0, k in student.stages)
            for k in names
        ]
    options = {"same_grid": method.same_grid, "by_index": method.pairs_by_index(node)}
    level_map = cfg.MODEL.DISTILLER.LEVEL_MAP
    stages = [name for name in names if name in student.stages]
    levels = [name for name in names if name not in stages]
    of_stages, of_levels = [], []
    for entry in level_map:
        (of_stages if entry.partition(":")[0] in stages else of_levels).append(entry)
    matched = match_levels(levels, student.levels, teacher.levels, of_levels, **options)
    if stages:
        theirs = teacher.stages or teacher.levels
        below = match_levels(stages, student.stages, theirs, of_stages, **options)
        matched += [level._replace(stage=True) for level in below]
    return sorted(matched, key=lambda level: names.index(level.name))


def level_names(method: Type[Method], cfg: CfgNode, student: Outputs) -> List[str]:
    """MODEL.DISTILLER.LEVELS, or the method's own choice; [] for a method without maps.

    Raises:
        UserError: LEVELS is empty and the student's architecture has no default.
    """
    if not {"maps", "student_maps"} & method.needs_of(method.node(cfg)):
        return []
    if cfg.MODEL.DISTILLER.LEVELS:
        return list(cfg.MODEL.DISTILLER.LEVELS)
    return method.choose_levels(head_levels(cfg), student.finest_first())


def head_levels(cfg: CfgNode) -> List[str]:
    """The levels that the student's head reads, finest first.

    That is p3-p7 for dense detectors (MODEL.RETINANET.IN_FEATURES and so on) and p2-p5 for R-CNN,
    the levels of the authors' configs. The last one is an FPN output for all: R-CNN's max-pooled
    p6 feeds the RPN only.

    Raises:
        UserError: the student's architecture has no such key.
    """
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
    names: Sequence[str],
    student: Shapes,
    teacher: Shapes,
    level_map: Sequence[str] = (),
    *,
    same_grid: bool = True,
    by_index: bool = False,
) -> List[Level]:
    """Pair levels of the student with outputs of the teacher: by the map, else by equal stride.

    Channels and names may differ.

    Args:
        names: the student's levels to distil. level_map: see `parse_level_map`.
        same_grid: cells are compared with cells, so the map may not pair unequal strides. False:
            it may, and a teacher of one output teaches every level.
        by_index: pair the finest of ``names`` with the teacher's finest output and so on, instead
            of by stride.
    Raises:
        UserError: a level has no partner or more than one; shows the table of both sides.
    """
    pairs = parse_level_map(level_map)
    ordered: List[str] = []
    if by_index:
        ordered = _finest_first([name for name in names if name in student], student)
        pairs = {**dict(zip(ordered, _finest_first(teacher, teacher))), **pairs}
    elif not same_grid and len(teacher) == 1:
        pairs = {**dict.fromkeys(names, next(iter(teacher))), **pairs}
    problems, found = [], []
    if len(set(names)) < len(names):
        problems.append(f"MODEL.DISTILLER.LEVELS {list(names)} names a level twice")
    for name in pairs.keys() - set(names):
        problems.append(f"MODEL.DISTILLER.LEVEL_MAP names {name!r}, which is not distilled")
    for name in names:
        if name in ordered and name not in pairs:
            problems.append(f"the teacher has only {len(teacher)} levels, none for {name!r}")
            continue
        try:
            partner = _partner(name, pairs.get(name), student, teacher, same_grid)
        except UserError as error:
            problems.append(str(error))
            continue
        channels = student[name].channels, teacher[partner].channels
        found.append(Level(name, *channels, partner, student[name].stride or 0))
    if problems:
        table = level_table(student, teacher, found)
        raise UserError(f"cannot distil: {'; '.join(problems)}.{_advice(found)}\n{table}")
    return found


def _finest_first(names: Iterable[str], shapes: Shapes) -> List[str]:
    return sorted(names, key=lambda name: shapes[name].stride or 0)


def _partner(
    name: str, mapped: Optional[str], student: Shapes, teacher: Shapes, same_grid: bool
) -> str:
    """The teacher's output for one level; UserError says why there is none."""
    if name not in student:
        raise UserError(f"the student has no level {name!r}")
    stride = student[name].stride
    if mapped is not None:
        if mapped not in teacher:
            raise UserError(f"MODEL.DISTILLER.LEVEL_MAP: the teacher has no level {mapped!r}")
        other = teacher[mapped].stride
        if same_grid and None not in (stride, other) and stride != other:
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
