"""Whether a pair of detectors has what a method needs, before anything is trained."""

from typing import Collection, Dict, Mapping, Optional, Type

from detectron2.config import CfgNode
from torch import nn

from ..data.second_images import KEY as SECOND_IMAGES
from ..errors import UserError
from ..methods.batch import Cut
from ..methods.method import METHOD_REGISTRY, NEEDS, Method, chosen_methods
from .dense_regions import why_no_region_embeddings, why_no_regions
from .heads import why_no_heads
from .regions import why_no_region_deltas, why_no_region_logits


def wants_regions(asked_for: Collection[str]) -> bool:
    return any(need.startswith("region") for need in asked_for)


def reasons(
    student: nn.Module,
    teacher: Optional[nn.Module],
    with_teacher: bool,
    cuts: Optional[Mapping[str, Cut]] = None,
) -> Dict[str, str]:
    """Need → why this pair does not have it; needs that it has are left out.

    Args:
        with_teacher: whether the method looks at the teacher's side too.
        cuts: where it takes maps out of the towers of dense heads, by key.
    """
    other = teacher if with_teacher else None
    found = {
        "teacher": "" if teacher is not None else "there is none",
        "regions": why_no_regions(student, other),
        "region_embeddings": why_no_region_embeddings(student, other),
        "region_logits": why_no_region_logits(student, other),
        "heads": why_no_heads(student, other, cuts),
        "region_deltas": why_no_region_deltas(student, other),
    }
    return {need: reason for need, reason in found.items() if reason}


def check_needs(cfg: CfgNode, student: nn.Module, teacher: Optional[nn.Module]) -> None:
    """Refuse a method that cannot work with this pair.

    Args:
        student, teacher: whole detectors.
    Raises:
        UserError: names the method, what it needs, why that is not there, and which methods would
            do.
    """
    for method in chosen_methods(cfg):
        for need, reason in sorted(_missing(method, cfg, student, teacher).items()):
            raise UserError(
                f"MODEL.DISTILLER.METHOD {method.__name__} needs {NEEDS[need]}: {reason}. "
                f"These work here: {', '.join(_working(cfg, student, teacher))}"
            )


def _missing(
    method: Type[Method], cfg: CfgNode, student: nn.Module, teacher: Optional[nn.Module]
) -> Dict[str, str]:
    """What a method needs under its keys in this config → why it is not there."""
    node = method.node(cfg)
    needs = method.needs_of(node)
    found = reasons(student, teacher, "teacher" in needs, method.cuts_of(node))
    if not cfg.DATASETS.TRAIN_SECOND_IMAGES:
        found["second_view"] = f"{SECOND_IMAGES} names no folder"
    return {need: reason for need, reason in found.items() if need in needs}


def _working(cfg: CfgNode, student: nn.Module, teacher: Optional[nn.Module]) -> list:
    """Names of methods that have what they need, under their keys in this config."""
    return [name for name, method in METHOD_REGISTRY if not _missing(method, cfg, student, teacher)]
