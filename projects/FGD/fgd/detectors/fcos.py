"""Detectron2's own FCOS from a yaml config; Detectron2 builds it from Python configs only."""

from typing import List

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances

from .pyramids import group_norm, pyramid

__all__ = ["FCOS", "add_fcos_config", "build_fcos_resnet_fpn_backbone"]


def add_fcos_config(cfg: CfgNode) -> None:
    """Add MODEL.FCOS, all defaults those of Detectron2's ``common/models/fcos.py``."""
    node = cfg.MODEL.FCOS = type(cfg)()
    node.NUM_CLASSES = 80
    # Backbone outputs that the head reads, finest first.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions of each of the two subnets, as wide as the pyramid.
    node.NUM_CONVS = 4
    # Norm of the subnets: "GN" (32 groups, fewer in narrow pyramids), "BN", "SyncBN" or "".
    node.NORM = "GN"
    # Score of every class before training.
    node.PRIOR_PROB = 0.01
    # Cells whose centre is closer to a box's centre than this, in strides, may be positive.
    node.CENTER_SAMPLING_RADIUS = 1.5
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Scores are the square root of class score times centerness: larger than RetinaNet's.
    node.SCORE_THRESH_TEST = 0.2
    node.TOPK_CANDIDATES_TEST = 1000  # per level
    node.NMS_THRESH_TEST = 0.6


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS, built from MODEL.FCOS; it also trains on images without boxes.

    Those make v0.6 fail (a maximum over no boxes); main took them in later.
    """

    @configurable
    def __init__(self, **arguments):
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node, backbone = cfg.MODEL.FCOS, build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in node.IN_FEATURES]
        head = fcos.FCOSHead(
            input_shape=shapes,
            num_classes=node.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * node.NUM_CONVS,
            norm=group_norm if node.NORM == "GN" else node.NORM,
            prior_prob=node.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": list(node.IN_FEATURES),
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def label_anchors(self, anchors, gt_instances: List[Instances]):
        """As Detectron2's; an image without boxes gets an empty one, which matches no anchor."""
        given = [x if len(x) else _with_empty_box(x, anchors) for x in gt_instances]
        return super().label_anchors(anchors, given)


def _with_empty_box(instances: Instances, anchors: List[Boxes]) -> Instances:
    box = anchors[0].tensor.new_zeros(1, 4)
    classes = torch.zeros(1, dtype=torch.int64, device=box.device)
    return Instances(instances.image_size, gt_boxes=Boxes(box), gt_classes=classes)


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet-FPN with p3-p7 as Detectron2's FCOS has it: p6 and p7 from p5, not from res5."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return pyramid(cfg, build_resnet_backbone(cfg, input_shape), top_block)
