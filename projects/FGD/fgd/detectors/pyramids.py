"""What pyramids over a backbone are made of: their norms, and levels above the last one."""

import math
from typing import Optional

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from timm.layers import LayerNorm2d
from torch import nn

from ..errors import UserError

__all__ = ["group_norm", "pyramid", "pyramid_norm", "top_block"]

_TOP_BLOCKS = ("default", "none", "maxpool", "p6p7")


def group_norm(channels: int) -> nn.GroupNorm:
    """Detectron2's "GN" (32 groups); where they do not divide the channels in twos, fewer.

    One value per group would always be normalised to 0, as on a map of one cell. An odd number of
    channels is one group; v0.6's FCOS tries a norm on one channel.
    """
    return nn.GroupNorm(math.gcd(32, channels, channels // 2), channels)


def pyramid_norm(name: str):
    """What Detectron2's FPN takes as its norm, for MODEL.FPN.NORM: narrow pyramids can be "GN", and
    "LN" normalises each cell, which v0.6 lacks."""
    return {"GN": group_norm, "LN": LayerNorm2d}.get(name, name)


def pyramid(cfg: CfgNode, bottom_up: Backbone, top_block: Optional[nn.Module]) -> FPN:
    """Detectron2's FPN of MODEL.FPN over `bottom_up`, with `top_block` for the levels above."""
    node = cfg.MODEL.FPN
    return FPN(
        bottom_up=bottom_up,
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=pyramid_norm(node.NORM),
        top_block=top_block,
        fuse_type=node.FUSE_TYPE,
    )


def top_block(
    cfg: CfgNode, default: str, in_feature: str, in_channels: int, p6p7=LastLevelP6P7
) -> Optional[nn.Module]:
    """The levels above the last one, of MODEL.TIMM.TOP_BLOCK; None for "none".

    Args:
        default: what "default" means.
        in_feature: what "p6p7" reads, of `in_channels`; "maxpool" reads the level of its number.
        p6p7: makes the top block of that name, with the signature of Detectron2's.
    """
    kind = cfg.MODEL.TIMM.TOP_BLOCK
    if kind not in _TOP_BLOCKS:
        raise UserError(f"MODEL.TIMM.TOP_BLOCK {kind!r}: expected {_TOP_BLOCKS}")
    kind = default if kind == "default" else kind
    if kind == "none":
        return None
    if kind == "p6p7":
        return p6p7(in_channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=in_feature)
    block = LastLevelMaxPool()
    block.in_feature = in_feature.replace("res", "p")  # Detectron2 fixes it to p5
    return block
