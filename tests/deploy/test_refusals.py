"""What cannot be exported is refused in one line that names the config key."""

import pytest
import torch
from detectron2.modeling import build_model

from deploy.checks.tiny import tiny_cfg
from deploy.export import main

from .conftest import save_checkpoint


def keypoints(cfg):
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [8]


def c4(cfg):
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.OUT_FEATURES = "build_resnet_backbone", ["res4"]
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.IN_FEATURES = "Res5ROIHeads", ["res4"]
    cfg.MODEL.RPN.IN_FEATURES = ["res4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]


def rotated(cfg):
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    cfg.MODEL.ROI_HEADS.NAME = "RROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignRotated"
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0)
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0, 1.0)


def panoptic(cfg):
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"


def densepose(cfg):
    cfg.MODEL.ROI_HEADS.NAME = "DensePoseROIHeads"


def point_rend(cfg):
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PointRendMaskHead"


def roi_pool_masks(cfg):
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = 1, "ROIPool"


def roi_pool(cfg):
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIPool"


def precomputed(cfg):
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"


@pytest.mark.parametrize(
    "change,key",
    [
        (keypoints, "MODEL.KEYPOINT_ON"),
        (c4, "MODEL.ROI_HEADS.NAME: Res5ROIHeads"),
        (rotated, "MODEL.PROPOSAL_GENERATOR.NAME: RRPN"),
        (panoptic, "MODEL.META_ARCHITECTURE 'PanopticFPN'"),
        (densepose, "MODEL.ROI_HEADS.NAME: No object named 'DensePoseROIHeads'"),
        (point_rend, "MODEL.ROI_MASK_HEAD.NAME: No object named 'PointRendMaskHead'"),
        (roi_pool_masks, "MODEL.ROI_MASK_HEAD.POOLER_TYPE: RoIPool"),
        (roi_pool, "MODEL.ROI_BOX_HEAD.POOLER_TYPE: RoIPool"),
        (precomputed, "MODEL.PROPOSAL_GENERATOR.NAME: NoneType"),
    ],
)
def test_one_line_names_the_key(change, key, tmp_path, capsys):
    cfg = tiny_cfg("Faster R-CNN")
    change(cfg)
    try:
        model = build_model(cfg)
    except KeyError:  # registered by other packages: any weights do
        model = torch.nn.Linear(1, 1)
    path = save_checkpoint(model, cfg, tmp_path / "student.pth")
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and key in error
    assert not (tmp_path / "student_onnx").exists()
