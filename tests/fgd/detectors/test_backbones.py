from types import SimpleNamespace

import pytest
import timm
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from torch import nn

from fgd.config import get_fgd_cfg
from fgd.detectors import backbones
from fgd.detectors.backbones import TimmBackbone
from fgd.errors import UserError

STAGES = ["res2", "res3", "res4", "res5"]


def backbone_cfg(builder="build_retinanet_timm_fpn_backbone", features=STAGES[1:], **timm_keys):
    cfg = get_fgd_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = builder, 0
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = list(features), 16
    for key, value in timm_keys.items():
        cfg.MODEL.TIMM[key] = value
    return cfg


def shapes(features):
    return {name: tuple(f.shape[1:]) for name, f in features.items()}


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "lcnet_035", "resnet10t", "convnext_atto"]
)
def test_last_feature_of_each_stride_under_detectron2_names(name):
    backbone = TimmBackbone(name, STAGES)
    features = backbone(torch.zeros(1, 3, 64, 96))
    assert list(features) == STAGES
    for feature, stride in zip(STAGES, (4, 8, 16, 32), strict=True):
        spec = backbone.output_shape()[feature]
        assert spec.stride == stride
        assert features[feature].shape == (1, spec.channels, 64 // stride, 96 // stride)


def test_stages_above_the_last_one_are_not_built():
    whole, half = TimmBackbone("resnet10t", STAGES), TimmBackbone("resnet10t", STAGES[:3])
    assert half.size_divisibility == 16 and whole.size_divisibility == 32
    names = {name.split(".")[1] for name in half.state_dict()}
    assert "layer4" not in names and "layer3" in names


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "lcnet_035", "efficientnet_lite0", "mobilenetv4_conv_small"]
)
@pytest.mark.parametrize("stages", [STAGES[:1], STAGES[1:3], STAGES])
def test_every_parameter_is_trained_whatever_the_stages(name, stages):
    """A parameter without gradient stops training on several GPUs."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, stages).eval()
    torch.manual_seed(0)
    whole = TimmBackbone(name, STAGES).eval()(torch.ones(1, 3, 64, 64))
    features = backbone(torch.ones(1, 3, 64, 64))
    assert list(features) == stages
    for stage, feature in features.items():
        torch.testing.assert_close(feature, whole[stage], rtol=0, atol=0)
    sum(feature.sum() for feature in features.values()).backward()
    assert [k for k, p in backbone.named_parameters() if p.grad is None] == []


def test_the_last_of_several_features_of_one_stride_counts(monkeypatch):
    info = SimpleNamespace(reduction=lambda: [2, 4, 4, 8, 16, 16, 16, 32])
    monkeypatch.setattr(
        backbones, "create_timm", lambda *_, **__: SimpleNamespace(feature_info=info)
    )
    assert backbones._stage_indices("any", STAGES) == (2, 3, 6, 7)
    assert backbones._stage_indices("any", ["res4"]) == (6,)


def test_channels_last_features_are_turned():
    class Body(nn.Module):
        output_fmt = "NHWC"

        def forward(self, x):
            return [x.permute(0, 2, 3, 1)[:, ::4, ::4]]

    backbone = TimmBackbone("resnet10t", ["res2"])
    backbone.body, backbone._channels_last = Body(), True
    image = torch.rand(2, 3, 8, 12)
    features = backbone(image)["res2"]
    torch.testing.assert_close(features, image[:, :, ::4, ::4])


@pytest.mark.parametrize(
    "builder, top_block, levels",
    [
        ("build_timm_fpn_backbone", "default", {"p5": 2, "p6": 1}),
        ("build_retinanet_timm_fpn_backbone", "default", {"p5": 2, "p6": 1, "p7": 1}),
        ("build_retinanet_timm_fpn_backbone", "none", {"p5": 2}),
        ("build_retinanet_timm_fpn_backbone", "maxpool", {"p5": 2, "p6": 1}),
        ("build_timm_fpn_backbone", "p6p7", {"p5": 2, "p6": 1, "p7": 1}),
    ],
)
def test_pyramid_levels(builder, top_block, levels):
    backbone = build_backbone(backbone_cfg(builder, TOP_BLOCK=top_block))
    features = backbone(torch.zeros(2, 3, 64, 64))
    expected = {"p3": (16, 8, 8), "p4": (16, 4, 4)}
    expected |= {level: (16, side, side) for level, side in levels.items()}
    assert shapes(features) == expected
    specs = {k: (s.channels, s.stride) for k, s in backbone.output_shape().items()}
    assert specs == {k: (16, 2 ** int(k[1])) for k in expected}
    assert backbone.size_divisibility == 32


def test_top_block_follows_the_last_input_feature():
    cfg = backbone_cfg("build_timm_fpn_backbone", STAGES[:3])
    backbone = build_backbone(cfg)
    assert list(backbone.output_shape()) == ["p2", "p3", "p4", "p5"]
    features = backbone(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(features["p5"], features["p4"][:, :, ::2, ::2])
    assert backbone.size_divisibility == 16


def test_fpn_norm_and_input_channels():
    cfg = backbone_cfg()
    cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    backbone = build_backbone(cfg, ShapeSpec(channels=1))
    assert isinstance(backbone.fpn_lateral3.norm, nn.GroupNorm)
    assert backbone(torch.zeros(1, 1, 64, 64))["p3"].shape == (1, 32, 8, 8)


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_one_step_trains_every_parameter_and_the_state_loads_strictly(arch, tiny_cfg, make_batch):
    cfg = tiny_cfg(arch)
    model = build_model(cfg).train()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.training for m in norms)
    mean_before = norms[0].running_mean.clone()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with EventStorage():
        sum(model(make_batch()).values()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    optimizer.step()
    moved = [k for k, p in model.named_parameters() if not torch.equal(p, before[k])]
    assert any(k.startswith("backbone.bottom_up.body.") for k in moved)
    assert not torch.equal(norms[0].running_mean, mean_before)

    torch.manual_seed(1)
    other = build_model(cfg)
    other.load_state_dict(model.state_dict(), strict=True)
    image = torch.rand(1, 3, 64, 64)
    expected = model.eval().backbone(image)
    actual = other.eval().backbone(image)
    for level in expected:
        torch.testing.assert_close(actual[level], expected[level], rtol=0, atol=0)


def test_backbone_exports_without_data_dependent_branches():
    backbone = build_backbone(backbone_cfg()).eval()
    image = torch.rand(1, 3, 64, 96)
    program = torch.export.export(backbone, (image,))
    expected, actual = backbone(image), program.module()(image)
    assert list(actual) == list(expected)
    for level in expected:
        torch.testing.assert_close(actual[level], expected[level])


def test_sync_batch_norm_replaces_every_batch_norm():
    backbone = TimmBackbone("lcnet_035", STAGES, norm="SyncBN")
    kinds = {type(m) for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds and all(issubclass(k, nn.SyncBatchNorm) for k in kinds)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "lcnet_035", "resnet10t"])
def test_group_norm_makes_an_image_independent_of_its_batch(name):
    torch.manual_seed(0)
    batch_normed = TimmBackbone(name, STAGES).train()
    torch.manual_seed(0)
    backbone = TimmBackbone(name, STAGES, norm="GN").train()
    dark, bright = torch.rand(1, 3, 64, 96), 50 + torch.rand(1, 3, 64, 96)
    both, alone = backbone(torch.cat([dark, bright])), backbone(dark)
    for level in STAGES:
        torch.testing.assert_close(both[level][:1], alone[level], rtol=1e-4, atol=1e-5)
        assert alone[level].std() > 0.01, "vacuous"
    theirs = batch_normed(torch.cat([dark, bright]))["res3"][:1]
    assert (theirs - batch_normed(dark)["res3"]).abs().max() > 0.1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    count = lambda model, kind: [type(m) for m in model.modules()].count(kind)  # noqa: E731
    for kind in (nn.ReLU, nn.Hardswish, nn.Conv2d):
        assert count(backbone, kind) == count(batch_normed, kind)


def test_group_norms_keep_what_batch_norms_started_with():
    """resnet's residual branches begin at 0."""
    backbone = TimmBackbone("resnet10t", STAGES, norm="GN")
    assert backbone.body.layer1[0].bn2.weight.abs().max() == 0
    assert backbone.body.layer1[0].bn1.weight.min() == 1


def fake_download(name, pretrained=False, **options):
    return timm.models.create_model(name, pretrained=False, **options)


def test_frozen_batch_norm_keeps_activations_and_ignores_the_batch(monkeypatch):
    """timm's BatchNormAct2d holds the ReLU; a plain conversion would lose it."""
    monkeypatch.setattr(backbones.timm, "create_model", fake_download)
    torch.manual_seed(0)
    frozen = TimmBackbone("lcnet_035", STAGES, pretrained=True, norm="FrozenBN").train()
    torch.manual_seed(0)
    plain = TimmBackbone("lcnet_035", STAGES).eval()
    assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in frozen.modules())
    image = torch.rand(1, 3, 64, 64)
    for level, expected in plain(image).items():
        torch.testing.assert_close(frozen(image)[level], expected)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"NAME": "mobilenetv3_tiny"}, "'mobilenetv3_tiny' is not a timm model (similar: mobile"),
        ({"NAME": "vit_tiny_patch16_224"}, "'vit_tiny_patch16_224' has features of strides"),
        ({"NORM": "LN"}, "MODEL.TIMM.NORM 'LN': expected one of BN, SyncBN, FrozenBN, GN"),
        ({"NORM": "GN", "PRETRAINED": True}, "GN needs MODEL.TIMM.PRETRAINED False"),
        ({"TOP_BLOCK": "p6"}, "MODEL.TIMM.TOP_BLOCK 'p6'"),
        ({"features": ["res1", "res2"]}, "MODEL.FPN.IN_FEATURES ['res1', 'res2']"),
        ({"features": ["res4", "res3"]}, "MODEL.FPN.IN_FEATURES ['res4', 'res3']"),
        ({"features": []}, "MODEL.FPN.IN_FEATURES []"),
    ],
    ids=str,
)
def test_wrong_settings_are_one_line(keys, said):
    with pytest.raises(UserError) as caught:
        build_backbone(backbone_cfg(**keys))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_freezing_stages_is_refused():
    cfg = backbone_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    with pytest.raises(UserError, match="FREEZE_AT is 2.*set it to 0"):
        build_backbone(cfg)


def test_failed_download_says_what_to_do(monkeypatch):
    def refuse(name, pretrained=False, **options):
        if pretrained:
            raise OSError("We couldn't connect to the hub\nCheck your connection")
        return fake_download(name, **options)

    monkeypatch.setattr(backbones.timm, "create_model", refuse)
    with pytest.raises(UserError) as caught:
        build_backbone(backbone_cfg(PRETRAINED=True))
    message = str(caught.value)
    assert "OSError: We couldn't connect to the hub Check your connection" in message
    assert "set MODEL.TIMM.PRETRAINED False" in message
