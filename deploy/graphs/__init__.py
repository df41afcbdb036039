"""Architectures that can be exported. A new one is one file and one line here."""

from typing import Type

from torch import nn

from deploy.errors import UserError
from deploy.graphs.cascade import ExportableCascadeRCNN
from deploy.graphs.common import ExportableDetector
from deploy.graphs.fcos import ExportableFCOS
from deploy.graphs.rcnn import ExportableRCNN
from deploy.graphs.reppoints import ExportableRepPoints
from deploy.graphs.retinanet import ExportableRetinaNet

# by meta-architecture, and by ROI heads where that has several kinds
EXPORTABLE = {
    "FCOS": ExportableFCOS,
    "GeneralizedRCNN": ExportableRCNN,
    "RepPoints": ExportableRepPoints,
    "RetinaNet": ExportableRetinaNet,
}
_BY_ROI_HEADS = {"CascadeROIHeads": ExportableCascadeRCNN}


def exportable_class(student: nn.Module) -> Type[ExportableDetector]:
    """The class that follows a Detectron2 model's inference.

    Raises:
        UserError: the meta-architecture cannot be exported.
    """
    name = type(student).__name__
    if name not in EXPORTABLE:
        raise UserError(f"MODEL.META_ARCHITECTURE: {name} cannot be exported; {supported()} can")
    heads = type(getattr(student, "roi_heads", None)).__name__
    return _BY_ROI_HEADS.get(heads, EXPORTABLE[name])


def exportable(student: nn.Module) -> ExportableDetector:
    """The graph module of a Detectron2 model, with copied weights, in eval mode.

    Raises:
        UserError: the meta-architecture, or a part of it, cannot be exported.
    """
    detector = exportable_class(student)(student)
    detector.follow_images()
    return detector


def supported() -> str:
    """Names of the exportable meta-architectures, for messages."""
    return ", ".join(sorted(EXPORTABLE))
