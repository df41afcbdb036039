"""What is distilled from what: the method, its levels, and the teacher as it needs it."""

import logging
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

from detectron2.config import CfgNode
from torch import nn

from ..console import FILE_ONLY
from ..methods.batch import Level
from ..methods.method import Method, build_method
from .config import asked_of_teacher, teacher_name
from .dense_regions import region_sizes
from .levels import Outputs, level_table, plan_levels
from .needs import check_needs, wants_regions
from .padding import check_padding
from .schedule import schedule_from_config
from .taps import Sources, choose_sources, describe_sources
from .teacher import FrozenTeacher
from .unlabeled import unlabeled_terms

logger = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What is distilled from what; nothing by default."""

    method: Optional[nn.Module] = None
    levels: Dict[Type[Method], List[Level]] = {}
    sources: Optional[Sources] = None
    teacher_sources: Optional[Sources] = None
    same_grid: Sequence[str] = ()


def make_plan(cfg: CfgNode, student: nn.Module, teacher: Optional[nn.Module]) -> Plan:
    """The method over pairs of levels, and where their tensors are; logs both.

    Args:
        student: a whole detector. teacher: whole too.
    Raises:
        UserError: the method cannot work with this pair.
    """
    if not cfg.MODEL.DISTILLER.METHOD:
        return Plan()
    check_needs(cfg, student, teacher)
    asked, regions = asked_of_teacher(cfg), None
    if {"regions", "region_embeddings"} & asked:
        regions = region_sizes(student, teacher)
    student, teacher = student.backbone, teacher and teacher.backbone
    if asked:
        check_padding(cfg, student, teacher)
    outputs = Outputs.of(student), teacher and Outputs.of(teacher)
    levels = plan_levels(cfg, *outputs)
    method = build_method(cfg, levels, regions)
    merged: Dict[str, Level] = {}
    for level in (level for own in levels.values() for level in own):
        if level.teacher_name or level.name not in merged:
            merged[level.name] = level
    if not merged:
        return Plan(method, levels, {}, {})
    partners = {name: level.teacher_name for name, level in merged.items()}
    if any(partners.values()):
        _log_levels(outputs, [level for level in merged.values() if level.teacher_name])
    sources = choose_sources(cfg.MODEL.DISTILLER.FEATURES, student, teacher, partners)
    for who, side in zip(("student", "teacher"), sources):
        if side:
            text = f"Distilled features of the {who}: {describe_sources(side)}"
            logger.info(text, extra=FILE_ONLY)
    taught = [(cls, x) for cls, own in levels.items() for x in own if x.teacher_name]
    same_grid = [x.name for cls, x in taught if cls.same_grid]
    return Plan(method, levels, *sources, same_grid)


def _log_levels(outputs: Tuple[Outputs, Outputs], levels: Sequence[Level]) -> None:
    """Tables of what teaches what: of the pyramids, and of the stages below where they teach."""
    student, teacher = outputs
    of_stages = [level for level in levels if level.stage]
    of_levels = [level for level in levels if not level.stage]
    table = level_table(student.levels, teacher.levels, of_levels)
    if of_stages:
        theirs = teacher.stages or teacher.levels
        table += f"\n{level_table(student.stages, theirs, of_stages)}"
    logger.info(f"Levels of student and teacher:\n{table}", extra=FILE_ONLY)


def freeze_teacher(
    cfg: CfgNode, model: Optional[nn.Module], teacher_cfg: Optional[CfgNode], plan: Plan
) -> Optional[FrozenTeacher]:
    """The teacher as the methods need it; None if none of them needs one."""
    asked = asked_of_teacher(cfg)
    if not asked:
        return None
    node = cfg.MODEL.DISTILLER.TEACHER
    formats = teacher_cfg.INPUT.FORMAT, cfg.INPUT.FORMAT
    keep = ["roi_heads"] if wants_regions(asked) else []
    keep += ["head"] if "heads" in asked else []
    options = node.PRECISION, node.CHANNELS_LAST, plan.teacher_sources, keep
    detects = unlabeled_terms(cfg).score > 0
    return FrozenTeacher(model, *formats, *options, detects)


def summarize(cfg: CfgNode, teacher_cfg: Optional[CfgNode], plan: Plan) -> str:
    node = cfg.MODEL.DISTILLER
    teacher = "no teacher"
    if teacher_cfg is not None:
        teacher = (
            f"teacher {teacher_cfg.MODEL.META_ARCHITECTURE} from {teacher_name(cfg)} in "
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
