"""RepPoints (ICCV 2019, arXiv 1904.11490), moment variant, as a Detectron2 meta-architecture.

Source: the authors' implementation in MMDetection. Boxes come twice from nine points per location:
the first points are also where a deformable convolution looks for the second ones and the class.
"""

from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from ...errors import UserError
from .assign import assign_by_iou, assign_points
from .head import RepPointsHead
from .losses import box_loss, class_loss, class_targets, normalizer
from .points import POINTS, MomentTransform, at_least_float32

__all__ = ["RepPoints", "add_reppoints_config"]


def add_reppoints_config(cfg: CfgNode) -> None:
    """Add MODEL.REPPOINTS, all defaults those of the authors' configs."""
    node = cfg.MODEL.REPPOINTS = type(cfg)()
    node.NUM_CLASSES = 80
    # Backbone outputs that the head reads, finest first, each of twice the stride before it.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions of each of the two towers, as wide as the pyramid.
    node.NUM_CONVS = 3
    # Norm of the towers: "GN" (32 groups, fewer in narrow pyramids) or "". The pyramid's own is
    # MODEL.FPN.NORM; all published 2x results have "GN" in both.
    node.NORM = "GN"
    # Score of every class before training.
    node.PRIOR_PROB = 0.01
    # Sides of a typical box of a level, in strides: decides the level of a box, and box losses are
    # in this unit.
    node.POINT_BASE_SCALE = 4
    # Of the second stage: overlap with a box under which a location is background, and from which
    # it is positive; what is between is ignored.
    node.IOU_THRESHOLDS = [0.4, 0.5]
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Where the box losses turn from square to linear, in the unit of POINT_BASE_SCALE.
    node.SMOOTH_L1_BETA = 0.11
    # Weights of the box losses of the two stages; that of the classes is 1.
    node.INIT_LOSS_WEIGHT = 0.5
    node.REFINE_LOSS_WEIGHT = 1.0
    node.SCORE_THRESH_TEST = 0.05
    node.TOPK_CANDIDATES_TEST = 1000  # per level
    node.NMS_THRESH_TEST = 0.5


@META_ARCH_REGISTRY.register()
class RepPoints(DenseDetector):
    """See the module; `head` gives logits and two sets of points per level.

    Args:
        point_base_scale, iou_thresholds, smooth_l1_beta, ...: as the keys of MODEL.REPPOINTS.
        Others mean the same as in Detectron2's `RetinaNet`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone,
        head: RepPointsHead,
        head_in_features: Sequence[str],
        num_classes: int,
        point_base_scale: int = 4,
        iou_thresholds: Tuple[float, float] = (0.4, 0.5),
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
        init_loss_weight: float = 0.5,
        refine_loss_weight: float = 1.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in head_in_features]
        # squares of one stride around the locations, which are the top left corners of the cells
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[s] for s in self.strides], aspect_ratios=[1.0], strides=self.strides, offset=0.0
        )
        self.box2box_transform = MomentTransform()
        self.num_classes = num_classes
        self.point_base_scale = point_base_scale
        self.iou_thresholds = tuple(iou_thresholds)
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.loss_weights = {
            "loss_box_init": init_loss_weight,
            "loss_box_refine": refine_loss_weight,
        }
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node, backbone = cfg.MODEL.REPPOINTS, build_backbone(cfg)
        if node.NORM not in ("GN", ""):
            raise UserError(f"MODEL.REPPOINTS.NORM {node.NORM!r}: expected 'GN' or ''")
        head = RepPointsHead(
            channels=backbone.output_shape()[node.IN_FEATURES[0]].channels,
            num_classes=node.NUM_CLASSES,
            num_convs=node.NUM_CONVS,
            norm=node.NORM,
            prior_prob=node.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "point_base_scale": node.POINT_BASE_SCALE,
            "iou_thresholds": node.IOU_THRESHOLDS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": node.SMOOTH_L1_BETA,
            "init_loss_weight": node.INIT_LOSS_WEIGHT,
            "refine_loss_weight": node.REFINE_LOSS_WEIGHT,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward_training(
        self, images: ImageList, features, predictions, gt_instances: List[Instances]
    ) -> Dict[str, Tensor]:
        """The three losses, weighted. Padding is part of the image, as all share it."""
        logits, first, refined = (
            at_least_float32(torch.cat(levels, dim=1)) for levels in self._dense(predictions)
        )
        anchors = Boxes.cat(self.anchor_generator(features)).tensor
        nearest = self._nearest([tuple(x.shape[-2:]) for x in features], gt_instances)
        overlapping = self._overlapping(first, anchors, gt_instances)
        of_nearest, of_overlapping = normalizer(nearest), normalizer(overlapping)
        losses = {
            "loss_cls": self._class_loss(logits, overlapping, gt_instances) / of_overlapping,
            "loss_box_init": self._box_loss(first, anchors, nearest, gt_instances) / of_nearest,
            "loss_box_refine": self._box_loss(refined, anchors, overlapping, gt_instances)
            / of_overlapping,
        }
        return {name: loss * self.loss_weights.get(name, 1.0) for name, loss in losses.items()}

    def _dense(self, predictions) -> List[List[Tensor]]:
        """The head's three outputs, each level as (N, H * W, channels)."""
        channels = [self.num_classes, 2 * POINTS, 2 * POINTS]
        return self._transpose_dense_predictions(predictions, channels)

    def _nearest(self, shapes, gt_instances: List[Instances]) -> Tensor:
        """(N, R) assignment of the first stage; shapes (height, width) of every level."""
        return torch.stack(
            [
                assign_points(x.gt_boxes.tensor, shapes, self.strides, self.point_base_scale)
                for x in gt_instances
            ]
        )

    def _overlapping(self, first: Tensor, anchors: Tensor, gt_instances) -> Tensor:
        """(N, R) assignment of the second stage, by what the first one predicts now."""
        with torch.no_grad():
            candidates = self.box2box_transform.apply_deltas(first, anchors)
        return torch.stack(
            [
                assign_by_iou(boxes, x.gt_boxes.tensor, *self.iou_thresholds)
                for boxes, x in zip(candidates, gt_instances)
            ]
        )

    def _class_loss(self, logits: Tensor, assigned: Tensor, gt_instances) -> Tensor:
        """Sum of focal losses; logits (N, R, K), assigned (N, R)."""
        targets = [
            class_targets(rows, x.gt_classes, self.num_classes)
            for rows, x in zip(assigned, gt_instances)
        ]
        target, counted = (torch.stack(tensors) for tensors in zip(*targets))
        return class_loss(logits, target, counted, self.focal_loss_alpha, self.focal_loss_gamma)

    def _box_loss(self, points: Tensor, anchors: Tensor, assigned: Tensor, gt_instances) -> Tensor:
        """Sum over the positive locations of points (N, R, 18); anchors (R, 4), assigned (N, R)."""
        positive = assigned >= 0
        targets = [x.gt_boxes.tensor[rows[rows >= 0]] for rows, x in zip(assigned, gt_instances)]
        anchors = anchors.expand(len(points), -1, -1)[positive]
        boxes = self.box2box_transform.apply_deltas(points[positive], anchors)
        unit = self.point_base_scale * (anchors[:, 2:3] - anchors[:, :1])
        return box_loss(boxes, torch.cat(targets), unit, self.smooth_l1_beta)

    def forward_inference(self, images: ImageList, features, predictions) -> List[Instances]:
        """Boxes are clipped before they suppress each other, as in the authors' code."""
        logits, _, refined = self._dense(predictions)
        anchors = self.anchor_generator(features)
        return [
            self._detect(anchors, [x[i] for x in logits], [x[i] for x in refined], image_size)
            for i, image_size in enumerate(images.image_sizes)
        ]

    def _detect(self, anchors, logits: List[Tensor], points: List[Tensor], image_size) -> Instances:
        found = self._decode_multi_level_predictions(
            anchors,
            [at_least_float32(x).sigmoid() for x in logits],
            points,
            self.test_score_thresh,
            self.test_topk_candidates,
            image_size,
        )
        found.pred_boxes.clip(image_size)
        boxes = found.pred_boxes.tensor
        keep = batched_nms(boxes, found.scores, found.pred_classes, self.test_nms_thresh)
        return found[keep[: self.max_detections_per_image]]
