"""A vision transformer of two blocks, known to timm by name, and tiny detectors over such."""

from detectron2.config import CfgNode
from timm.models import VisionTransformer, build_model_with_cfg, register_model

from tests.conftest import make_tiny_cfg

SQUARE = 128
BUILDERS = {
    "RetinaNet": "build_retinanet_vit_fpn_backbone",
    "GeneralizedRCNN": "build_vit_fpn_backbone",
}


@register_model
def two_blocks_vit(pretrained: bool = False, **options) -> VisionTransformer:
    """32 channels, 2 heads, a class token."""
    shape = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, **options}
    features = {"feature_cls": "getter"}
    return build_model_with_cfg(VisionTransformer, "test_vit", False, feature_cfg=features, **shape)


def vit_cfg(arch: str = "GeneralizedRCNN", name: str = "two_blocks_vit", channels: int = 16):
    """`make_tiny_cfg` over a vision transformer and a square of 128 pixels: p2-p6, or p3-p7."""
    return over_vit(make_tiny_cfg(arch, channels), name)


def over_vit(cfg: CfgNode, name: str = "two_blocks_vit") -> CfgNode:
    """The config with that backbone, in place."""
    cfg.MODEL.BACKBONE.NAME = BUILDERS[cfg.MODEL.META_ARCHITECTURE]
    cfg.MODEL.TIMM.NAME, cfg.MODEL.VIT.SQUARE, cfg.MODEL.FPN.NORM = name, SQUARE, "LN"
    return cfg
