"""Whether a pair of detectors has what a method needs, before anything is trained."""

from typing import Collection, Dict, Optional

from detectron2.config import CfgNode
from torch import nn

from ..errors import UserError
from ..methods.method import METHOD_REGISTRY, NEEDS, chosen_methods
from .regions import why_no_region_logits, why_no_regions


def wants_regions(asked_for: Collection[str]) -> bool:
    return any(need.startswith("region") for need in asked_for)


def reasons(student: nn.Module, teacher: Optional[nn.Module], with_teacher: bool) -> Dict[str, str]:
    """Need → why this pair does not have it; needs that it has are left out.

    Args:
        with_teacher: whether the method looks at the teacher's side too.
    """
    other = teacher if with_teacher else None
    found = {
        "teacher": "" if teacher is not None else "there is none",
        "regions": why_no_regions(student, other),
        "region_levels": why_no_regions(student, other),
        "region_logits": why_no_region_logits(student, other),
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
        needs = method.needs_of(method.node(cfg))
        missing = reasons(student, teacher, "teacher" in needs)
        for need in sorted(needs & missing.keys()):
            raise UserError(
                f"MODEL.DISTILLER.METHOD {method.__name__} needs {NEEDS[need]}: {missing[need]}. "
                f"These work here: {', '.join(_working(cfg, student, teacher))}"
            )


def _working(cfg: CfgNode, student: nn.Module, teacher: Optional[nn.Module]) -> list:
    """Names of methods that have what they need, under their keys in this config."""
    return [
        name
        for name, method in METHOD_REGISTRY
        for needs in [method.needs_of(method.node(cfg))]
        if not needs & reasons(student, teacher, "teacher" in needs).keys()
    ]
