"""Regions of two-stage detectors: the student's sampled proposals, and what both heads say of them.

Recorded by hooks on modules of the student's forward; nothing of Detectron2 is replaced. Of a
Cascade R-CNN, student or teacher, it is the first stage, the one whose boxes are the proposals.
"""

from typing import Dict, List, Mapping, NamedTuple, Optional

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..methods.batch import Regions, RegionView


class Recorded(NamedTuple):
    """One training forward of the student's second stage."""

    maps: List[Tensor]  # that regions are pooled from, finest first
    boxes: List[Boxes]
    proposals: List[Instances]
    view: RegionView


class RegionTap:
    """Records one training forward of a student's RoI heads and hands it out exactly once.

    It holds references to what autograd keeps anyway, and none after they were handed out.
    """

    def __init__(self, roi_heads: nn.Module):
        self._parts: Dict[str, tuple] = {}
        self._heads = roi_heads
        for name in ("box_pooler", "box_head", "box_predictor"):
            module = first_stage(getattr(roi_heads, name))
            module.register_forward_hook(
                lambda module, args, output, name=name: self._save(name, args, output)
            )
        roi_heads.register_forward_hook(lambda *call: self._save("roi_heads", *call[1:]))

    def _save(self, name: str, args: tuple, output) -> None:
        # A cascade's later stages pool again, from boxes of their own.
        if self._heads.training and name not in self._parts:
            self._parts[name] = args, output

    def pop(self) -> Recorded:
        """Of the last training forward.

        Raises:
            RuntimeError: the RoI heads have not run in training mode since the last call.
        """
        if "roi_heads" not in self._parts:
            raise RuntimeError("the student's RoI heads did not run, or their record was taken")
        parts, self._parts = self._parts, {}
        (maps, boxes), features = parts["box_pooler"]
        view = RegionView(features, parts["box_head"][1], *parts["box_predictor"][1])
        return Recorded(maps, boxes, parts["roi_heads"][1][0], view)


def first_stage(module: nn.Module) -> nn.Module:
    return module[0] if isinstance(module, nn.ModuleList) else module


@torch.no_grad()
def view_of(roi_heads: nn.Module, outputs: Mapping[str, Tensor], boxes: List[Boxes]) -> RegionView:
    """What RoI heads in eval mode say of given boxes.

    Args:
        outputs: of their backbone, by name. boxes: of each image, in pixels of the network input.
    """
    maps = [outputs[name] for name in roi_heads.box_in_features]
    features = roi_heads.box_pooler(maps, boxes)
    embedding = first_stage(roi_heads.box_head)(features)
    logits, deltas = first_stage(roi_heads.box_predictor)(embedding)
    return RegionView(features, embedding, logits, deltas)


def regions_of(recorded: Recorded, student: nn.Module, teacher: Optional[RegionView]) -> Regions:
    """Everything about the student's sampled proposals of one batch.

    Args:
        student: its RoI heads. teacher: what the teacher says of the same boxes.
    """
    boxes = [x.tensor.detach() for x in recorded.boxes]
    labels = [x.gt_classes for x in recorded.proposals]
    # An image without objects has no gt_boxes.
    targets = [
        x.gt_boxes.tensor if x.has("gt_boxes") else own
        for x, own in zip(recorded.proposals, boxes, strict=True)
    ]
    return Regions(
        boxes=boxes,
        labels=torch.cat(labels),
        targets=torch.cat(targets),
        num_classes=student.num_classes,
        student=recorded.view,
        teacher=teacher,
        delta_weights=first_stage(student.box_predictor).box2box_transform.weights,
    )


def has_roi_heads(model: nn.Module) -> bool:
    return hasattr(getattr(model, "roi_heads", None), "box_pooler")


def box_head_width(model: nn.Module) -> int:
    """Length of the vector that the box head makes of a region; 0 if it is a map."""
    shape = first_stage(model.roi_heads.box_head).output_shape
    return shape.channels if shape.height is None else 0


def why_no_roi_heads(student: Optional[nn.Module], teacher: Optional[nn.Module]) -> str:
    """Why one of a pair has no second stage; "" if both have. None is not looked at."""
    for who, model in (("student", student), ("teacher", teacher)):
        if model is not None and not has_roi_heads(model):
            return f"the {who}, {type(model).__name__}, has no RoI heads over a pyramid"
    return ""


def why_no_region_logits(student: nn.Module, teacher: Optional[nn.Module]) -> str:
    """Why class logits of regions cannot be compared; "" if they can."""
    reason = why_no_roi_heads(student, teacher)
    if reason or teacher is None:
        return reason
    own, theirs = (x.roi_heads.num_classes for x in (student, teacher))
    if own != theirs:
        return f"the student distinguishes {own} classes, the teacher {theirs}"
    return ""


def why_no_region_deltas(student: nn.Module, teacher: Optional[nn.Module]) -> str:
    """Why box deltas of regions cannot be compared class by class; "" if they can."""
    reason = why_no_region_logits(student, teacher)
    if reason:
        return reason
    weights = []
    for who, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        predictor = first_stage(model.roi_heads.box_predictor)
        if predictor.bbox_pred.out_features != 4 * model.roi_heads.num_classes:
            return f"the {who} has deltas for all classes together (CLS_AGNOSTIC_BBOX_REG)"
        weights.append(tuple(predictor.box2box_transform.weights))
    if len(set(weights)) > 1:
        return f"the student scales them by BBOX_REG_WEIGHTS {weights[0]}, the teacher {weights[1]}"
    return ""
