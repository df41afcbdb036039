import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import fcos
from detectron2.utils.events import EventStorage

from fgd.config import get_fgd_cfg
from fgd.data.checks import NUM_CLASSES_KEYS
from fgd.detectors.fcos import FCOS, build_fcos_resnet_fpn_backbone
from fgd.detectors.pyramids import group_norm
from fgd.distillation.levels import head_levels


@pytest.fixture
def cfg():
    cfg = get_fgd_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "FCOS"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_timm_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["res3", "res4", "res5"], 16
    cfg.MODEL.FCOS.NUM_CLASSES, cfg.MODEL.FCOS.NUM_CONVS = 3, 1
    return cfg


def test_defaults_are_detectron2s_own():
    """Its Python config, with a small backbone in place of ResNet-50."""
    path = model_zoo.get_config_file("COCO-Detection/fcos_R_50_FPN_1x.py")
    lazy = LazyConfig.load(path).model
    cfg = get_fgd_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "FCOS", "meta"
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    with torch.device("meta"):
        ours = build_model(cfg)
    assert isinstance(ours, fcos.FCOS)
    for key, value in lazy.items():
        if key.startswith(("test_", "focal_", "num_")):
            assert getattr(ours, key) == value, key
    for key in ("center_sampling_radius", "test_topk_candidates", "max_detections_per_image"):
        assert getattr(ours, key) == fcos.FCOS.__init__.__kwdefaults__[key]
    lazy.head.norm = group_norm  # v0.6 cannot build its "GN" with today's PyTorch
    lazy.head.num_classes = lazy.num_classes
    with torch.device("meta"):
        head = instantiate(lazy.head)
        backbone = instantiate(lazy.backbone)
    for own, theirs in ((ours.head, head), (ours.backbone, backbone)):
        shapes = {name: value.shape for name, value in theirs.state_dict().items()}
        assert {name: value.shape for name, value in own.state_dict().items()} == shapes
    assert head.cls_subnet[1].num_groups == ours.head.cls_subnet[1].num_groups == 32
    assert ours.backbone.top_block.in_feature == "p5"


def test_it_trains_and_an_image_without_boxes_is_background(cfg, make_batch):
    model = build_model(cfg).train()
    assert type(model) is FCOS
    batch = make_batch()
    with EventStorage():
        losses = model(batch)
        assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
        batch[1]["instances"] = batch[1]["instances"][:0]
        mixed = model(batch)
        batch[0]["instances"] = batch[0]["instances"][:0]
        empty = model(batch)
        sum(empty.values()).backward()
    assert all(torch.isfinite(x) and x > 0 for x in (*losses.values(), *mixed.values()))
    assert empty["loss_fcos_cls"] > 0
    assert empty["loss_fcos_loc"] == empty["loss_fcos_ctr"] == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)


def test_labels_of_an_image_with_boxes_are_detectron2s(cfg, make_batch):
    model = build_model(cfg)
    images = [item["instances"] for item in make_batch()]
    anchors = model.anchor_generator([torch.zeros(1, 16, n, n) for n in (16, 8, 4, 2, 1)])
    labels, _ = model.label_anchors(anchors, [images[0], images[1][:0]])
    expected, _ = fcos.FCOS.label_anchors(model, anchors, images[:1])
    assert torch.equal(labels[0], expected[0]) and (labels[0] < 3).any()
    assert (labels[1] == 3).all()


def test_the_rest_of_the_project_knows_it(cfg):
    cfg.MODEL.DISTILLER.STUDENT = "FCOS"
    assert head_levels(cfg) == ["p3", "p4", "p5", "p6", "p7"]
    assert NUM_CLASSES_KEYS["FCOS"] == "MODEL.FCOS.NUM_CLASSES"


def test_resnet_pyramid_takes_p6_from_p5(cfg):
    cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    backbone = build_fcos_resnet_fpn_backbone(cfg, ShapeSpec(channels=3))
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {
        **{"p3": 8, "p4": 16, "p5": 32},
        **{"p6": 64, "p7": 128},
    }
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 128, 128))
        expected = backbone.top_block.p6(features["p5"])
    torch.testing.assert_close(features["p6"], expected)
