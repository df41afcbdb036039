import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from fgd.config import get_fgd_cfg
from fgd.detectors.reppoints.neck import (
    PlainP6P7,
    build_reppoints_resnet_fpn_backbone,
    build_reppoints_timm_fpn_backbone,
)

STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}


@pytest.fixture
def cfg():
    cfg = get_fgd_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM = 16, "GN"
    return cfg


BUILDERS = [build_reppoints_resnet_fpn_backbone, build_reppoints_timm_fpn_backbone]


@pytest.mark.parametrize("build", BUILDERS)
def test_p6_comes_from_c5_and_every_convolution_has_its_norm(build, cfg):
    backbone = build(cfg, ShapeSpec(channels=3)).eval()
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == STRIDES
    convs = {
        n: m for n, m in backbone.named_modules() if "bottom_up" not in n and hasattr(m, "norm")
    }
    assert len(convs) == 3 + 3 + 2
    assert all(isinstance(m.norm, nn.GroupNorm) and m.bias is None for m in convs.values())
    with torch.no_grad():
        images = torch.randn(1, 3, 256, 256)
        features, c5 = backbone(images), backbone.bottom_up(images)["res5"]
        top = backbone.top_block
        torch.testing.assert_close(features["p6"], top.p6(c5))
        torch.testing.assert_close(features["p7"], top.p7(top.p6(c5)))
    assert (features["p6"] < 0).any()  # so a ReLU before p7 would show


def test_without_norm_the_convolutions_have_biases(cfg):
    block = PlainP6P7(4, 8, in_feature="res5")
    assert block.p6.bias is not None and block.p7.norm is None
    assert [tuple(x.shape) for x in block(torch.zeros(1, 4, 5, 8))] == [(1, 8, 3, 4), (1, 8, 2, 2)]


def test_small_images_can_do_without_the_top(cfg):
    cfg.MODEL.TIMM.TOP_BLOCK = "none"
    backbone = build_reppoints_timm_fpn_backbone(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == ["p3", "p4", "p5"]
