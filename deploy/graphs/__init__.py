"""Meta-architectures that can be exported. A new one is one file and one line here."""

from torch import nn

from deploy.errors import UserError
from deploy.graphs.common import ExportableDetector
from deploy.graphs.rcnn import ExportableRCNN
from deploy.graphs.retinanet import ExportableRetinaNet

EXPORTABLE = {"GeneralizedRCNN": ExportableRCNN, "RetinaNet": ExportableRetinaNet}


def exportable(student: nn.Module) -> ExportableDetector:
    """The graph module of a Detectron2 model, with copied weights, in eval mode.

    Raises:
        UserError: the meta-architecture, or a part of it, cannot be exported.
    """
    name = type(student).__name__
    if name not in EXPORTABLE:
        raise UserError(f"MODEL.META_ARCHITECTURE: {name} cannot be exported; {supported()} can")
    return EXPORTABLE[name](student)


def supported() -> str:
    """Names of the exportable meta-architectures, for messages."""
    return ", ".join(sorted(EXPORTABLE))
