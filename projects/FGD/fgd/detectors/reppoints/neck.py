"""The pyramid of RepPoints: any norm after every convolution, and no activation anywhere."""

from functools import partial
from typing import List

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import build_resnet_backbone
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from ..backbones import timm_fpn
from ..pyramids import pyramid, pyramid_norm

__all__ = [
    "PlainP6P7",
    "build_reppoints_resnet_fpn_backbone",
    "build_reppoints_timm_fpn_backbone",
]


class PlainP6P7(nn.Module):
    """p6 and p7, each a convolution of stride 2 of the one before: p7 of p6 itself.

    Detectron2's `LastLevelP6P7` has a ReLU between them and no norm.

    Args:
        in_feature: of the body, e.g. "res5"; it has `in_channels`.
        norm: as MODEL.FPN.NORM; the convolutions have a bias only if there is none.
    """

    num_levels = 2  # which Detectron2's FPN asks for

    def __init__(self, in_channels: int, out_channels: int, *, in_feature: str, norm: str = ""):
        super().__init__()
        self.in_feature = in_feature
        self.p6 = _strided(in_channels, out_channels, norm)
        self.p7 = _strided(out_channels, out_channels, norm)

    def forward(self, c5: Tensor) -> List[Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


def _strided(in_channels: int, out_channels: int, norm: str) -> Conv2d:
    made = get_norm(pyramid_norm(norm), out_channels)
    conv = Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=made is None, norm=made)
    c2_xavier_fill(conv)
    return conv


@BACKBONE_REGISTRY.register()
def build_reppoints_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet-FPN with p3-p7: MODEL.RESNETS, MODEL.FPN; p6 comes from the last of IN_FEATURES."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    node, last = cfg.MODEL.FPN, cfg.MODEL.FPN.IN_FEATURES[-1]
    channels = bottom_up.output_shape()[last].channels
    top_block = PlainP6P7(channels, node.OUT_CHANNELS, in_feature=last, norm=node.NORM)
    return pyramid(cfg, bottom_up, top_block)


@BACKBONE_REGISTRY.register()
def build_reppoints_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same over MODEL.TIMM; MODEL.TIMM.TOP_BLOCK "none" leaves p6 and p7 out."""
    return timm_fpn(cfg, input_shape, "p6p7", partial(PlainP6P7, norm=cfg.MODEL.FPN.NORM))
