"""The detectors that a start offers, as their hand-written configs in configs/ have them."""

from typing import List, NamedTuple

from .yaml_text import Value


class Detector(NamedTuple):
    """Meta-architecture and the timm builder of its pyramid.

    Attributes:
        heads: MODEL.ROI_HEADS.NAME of two-stage detectors. anchored: whether boxes start as
            anchors. masks: whether it learns them.
    """

    architecture: str
    builder: str = "build_retinanet_timm_fpn_backbone"
    heads: str = ""
    anchored: bool = False
    masks: bool = False

    @property
    def two_stage(self) -> bool:
        return bool(self.heads)


_RCNN = ("GeneralizedRCNN", "build_timm_fpn_backbone")
DETECTORS = {
    "retinanet": Detector("RetinaNet", anchored=True),
    "fcos": Detector("FCOS"),
    "reppoints": Detector("RepPoints", "build_reppoints_timm_fpn_backbone"),
    "frcnn": Detector(*_RCNN, "StandardROIHeads", anchored=True),
    "cascade": Detector(*_RCNN, "CascadeROIHeads", anchored=True),
    "mask_rcnn": Detector(*_RCNN, "StandardROIHeads", anchored=True, masks=True),
}


def head_values(detector: Detector, norm: str, levels: List[str], most_boxes: int) -> List[Value]:
    """What its heads have beside classes and levels.

    Args:
        norm: "BN" or "GN". most_boxes: of one image.
    """
    if detector.two_stage:
        return _two_stages(detector, levels, most_boxes)
    ret = [Value(f"MODEL.{detector.architecture.upper()}.NUM_CONVS", 2)]
    if detector.architecture != "RetinaNet":  # the others' heads have group norms by default
        return ret
    if norm == "BN":
        return [*ret, Value("MODEL.RETINANET.NORM", "BN")]
    return [*ret, Value("MODEL.RETINANET.NORM", "", "Detectron2 v0.6 cannot build GN in this head")]


def _two_stages(detector: Detector, levels: List[str], most_boxes: int) -> List[Value]:
    """Small heads, as in configs/nuclei."""
    proposals = max(200, 2 * most_boxes)
    ret = [
        Value("MODEL.RPN.IN_FEATURES", levels),
        Value("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 128),
        Value("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 2 * proposals),
        Value("MODEL.RPN.PRE_NMS_TOPK_TEST", 2 * proposals),
        Value("MODEL.RPN.POST_NMS_TOPK_TRAIN", proposals + proposals // 2),
        Value("MODEL.RPN.POST_NMS_TOPK_TEST", proposals, "twice the most boxes, or 200"),
        Value("MODEL.ROI_HEADS.NAME", detector.heads),
        Value("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
        Value("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
        Value("MODEL.ROI_BOX_HEAD.NUM_FC", 2),
        Value("MODEL.ROI_BOX_HEAD.FC_DIM", 128),
        Value("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    ]
    if detector.heads == "CascadeROIHeads":
        ret.append(Value("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "as a cascade needs"))
    if detector.masks:
        node = "MODEL.ROI_MASK_HEAD"
        ret += [
            Value("MODEL.MASK_ON", True),
            Value(f"{node}.NAME", "MaskRCNNConvUpsampleHead"),
            Value(f"{node}.NUM_CONV", 2),
            Value(f"{node}.CONV_DIM", 64),
            Value(f"{node}.POOLER_RESOLUTION", 7, "masks of 14x14"),
        ]
    return ret
