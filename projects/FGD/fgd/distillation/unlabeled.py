"""What images without labels teach: the terms that count without boxes, or with the teacher's.

Each step runs the student's backbone once more, on these images alone, and the teacher on them.
Live batch norms of the student see them too, after the labelled ones: their running statistics are
of both.
"""

from typing import Dict, List, Mapping, NamedTuple, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn

from ..config import META_ARCHITECTURE
from ..data.unlabeled import COUNT, MARK
from ..errors import UserError
from ..methods.batch import Batch
from ..methods.method import METHOD_REGISTRY, Sum, Table, chosen_methods

Names = Mapping[str, Tuple[str, ...]]  # by the prefix of a method
_LOOKED_AT = frozenset({"teacher", "maps"})  # what can be had of an image without a student's head


class UnlabeledTerms(NamedTuple):
    """Which terms count on images without labels; none by default.

    Attributes:
        terms: prefix of a method → names in its table. boxless: those of them that need no boxes.
        weight: on all of them. score: from which the teacher's detections are boxes; 0 = there are
            none.
    """

    terms: Names = {}
    boxless: Names = {}
    weight: float = 1.0
    score: float = 0.0

    @property
    def loss_names(self) -> Tuple[str, ...]:
        return tuple(f"loss_{MARK}_{name}" for own in self.terms.values() for name in own)

    def table(self, distillation: nn.Module, batch: Batch) -> Table:
        """Level → term → weighted scalar, both by names of their own.

        An image without any box is unknown: terms that need boxes add 0 for it.
        """
        rows = [i for i, boxes in enumerate(batch.boxes) if len(boxes)]
        if len(rows) == len(batch.boxes):
            return self._chosen(distillation, batch, self.terms, 1.0)
        found = self._chosen(distillation, batch, self.boxless, 1.0)
        if rows:
            boxed = {k: tuple(set(v).difference(self.boxless[k])) for k, v in self.terms.items()}
            share = len(rows) / len(batch.boxes)
            own = self._chosen(distillation, batch.images(rows), boxed, share)
            for level, values in own.items():
                found.setdefault(level, {}).update(values)
        return found

    def _chosen(self, distillation: nn.Module, batch: Batch, names: Names, share: float) -> Table:
        methods = distillation.methods.values() if isinstance(distillation, Sum) else [distillation]
        factor, found = self.weight * share, {}
        for method in methods:
            wanted = names.get(method.prefix(), ())
            for level, values in method.table(batch).items() if wanted else ():
                own = {f"{MARK}_{k}": factor * v for k, v in values.items() if k in wanted}
                found.setdefault(f"{level}_{MARK}", {}).update(own)
        return found


NO_TERMS = UnlabeledTerms()


def wants_unlabeled(cfg: CfgNode) -> bool:
    """Whether training batches have images without labels: something is distilled from them."""
    distilled = cfg.MODEL.META_ARCHITECTURE == META_ARCHITECTURE and cfg.MODEL.DISTILLER.METHOD
    return bool(distilled) and cfg.DATALOADER.UNLABELED_PER_BATCH > 0


def unlabeled_terms(cfg: CfgNode) -> UnlabeledTerms:
    """Those of a config; with boxes of the teacher all terms of a method, without its boxless ones.

    Raises:
        UserError: MODEL.DISTILLER.PSEUDO_BOXES or UNLABELED_WEIGHT mean nothing, or no term counts.
    """
    node = cfg.MODEL.DISTILLER
    _check_values(node)
    if not wants_unlabeled(cfg):
        if node.PSEUDO_BOXES and not cfg.DATALOADER.UNLABELED_PER_BATCH:
            raise UserError(
                f"MODEL.DISTILLER.PSEUDO_BOXES: {node.PSEUDO_BOXES} is of images without labels, "
                f"and {COUNT} is 0"
            )
        return NO_TERMS
    found: Dict[str, Tuple[str, ...]] = {}
    boxless: Dict[str, Tuple[str, ...]] = {}
    for method in chosen_methods(cfg):
        if method.needs_of(method.node(cfg)) <= _LOOKED_AT:
            name = method.prefix()
            boxless[name] = tuple(f"{name}_{term}" for term in method.boxless)
            every = tuple(f"{name}_{term}" for term in method.terms)
            found[name] = every if node.PSEUDO_BOXES else boxless[name]
    if not any(found.values()):
        able = ", ".join(name for name, method in METHOD_REGISTRY if method.boxless)
        raise UserError(
            f"{COUNT}: {cfg.DATALOADER.UNLABELED_PER_BATCH}, but no term of MODEL.DISTILLER.METHOD "
            f"{node.METHOD} counts on images without labels; there are some of {able}"
        )
    return UnlabeledTerms(found, boxless, node.UNLABELED_WEIGHT, node.PSEUDO_BOXES)


def _check_values(node: CfgNode) -> None:
    if not 0 <= node.PSEUDO_BOXES < 1:
        raise UserError(
            f"MODEL.DISTILLER.PSEUDO_BOXES: {node.PSEUDO_BOXES} is no score from 0 to below 1"
        )
    if node.PSEUDO_BOXES and node.TEACHER.TIMM:
        raise UserError(
            f"MODEL.DISTILLER.PSEUDO_BOXES: {node.PSEUDO_BOXES}, but the teacher "
            f"{node.TEACHER.TIMM} is no detector and finds no boxes"
        )
    if not 0 <= node.UNLABELED_WEIGHT < float("inf"):
        raise UserError(
            f"MODEL.DISTILLER.UNLABELED_WEIGHT: {node.UNLABELED_WEIGHT} is not a finite weight >= 0"
        )


def split(batched_inputs: List[dict]) -> Tuple[List[dict], List[dict]]:
    """The images with labels, and those without."""
    sides: Tuple[List[dict], List[dict]] = ([], [])
    for sample in batched_inputs:
        sides[MARK in sample].append(sample)
    return sides


def without_boxes(batched_inputs: List[dict], device: torch.device) -> List[Instances]:
    """Ground truth of no row, for methods that are asked for their boxless terms alone."""
    rows = {
        "gt_boxes": Boxes(torch.zeros(0, 4, device=device)),
        "gt_classes": torch.zeros(0, dtype=torch.long, device=device),
    }
    return [Instances(tuple(x["image"].shape[-2:]), **rows) for x in batched_inputs]
