"""RepPoints: importing it registers the meta-architecture and its two backbones."""

from .detector import RepPoints, add_reppoints_config
from .neck import build_reppoints_resnet_fpn_backbone, build_reppoints_timm_fpn_backbone

__all__ = [
    "RepPoints",
    "add_reppoints_config",
    "build_reppoints_resnet_fpn_backbone",
    "build_reppoints_timm_fpn_backbone",
]
