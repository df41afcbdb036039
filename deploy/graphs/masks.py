"""Mask R-CNN's mask head as a part of a graph, behind any box head."""

from typing import Dict

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from torch import Tensor

from deploy.errors import UserError
from deploy.graphs.common import require
from deploy.graphs.regions import pool


def check_mask_head(heads) -> None:
    """UserError unless the mask head of Detectron2's ROI heads is one that is followed here."""
    require(heads.mask_head, MaskRCNNConvUpsampleHead, "MODEL.ROI_MASK_HEAD.NAME")
    if heads.mask_pooler is None:
        raise UserError('MODEL.ROI_MASK_HEAD.POOLER_TYPE "" cannot be exported, only ROIAlign can')
    require(heads.mask_pooler.level_poolers[0], ROIAlign, "MODEL.ROI_MASK_HEAD.POOLER_TYPE")


def mask_size(heads) -> int:
    """Cells per side of a mask: twice the pooled ones, by the head's one upsampling layer."""
    return 2 * heads.mask_pooler.output_size[0]


def mask_logits(heads, features: Dict[str, Tensor], boxes: Tensor) -> Tensor:
    """(B * K, classes or 1, M, M) of the detected boxes (B, K, 4)."""
    levels = [features[level] for level in heads.mask_in_features]
    return heads.mask_head.layers(pool(heads.mask_pooler, levels, boxes))


def mask_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Each detection's mask of its own class.

    Args:
        logits: as `mask_logits`.  labels: (B, K), -1 where there is no detection.
    Returns:
        (B, K, M, M) in 0..1; 0 where there is no detection.
    """
    if logits.shape[1] > 1:
        chosen = labels.reshape(-1, 1, 1, 1).clamp(min=0).to(torch.int64)
        logits = logits.gather(1, chosen.expand(-1, -1, *logits.shape[2:]))
    masks = logits.sigmoid().reshape(*labels.shape, *logits.shape[2:])
    return torch.where((labels >= 0)[..., None, None], masks, 0.0)
