"""Tiny detectors that train and run in well under a second on one core."""

import logging

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import setup_logger
from hypothesis import settings

from fgd.config import get_fgd_cfg

# Other examples every time; 2,000 of tests that state no number:
# pytest --hypothesis-profile=thorough tests/fgd_inputs
settings.register_profile("thorough", max_examples=2000, deadline=None)
# The suite draws the same examples every time, so that it fails for a change alone.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

TINY_BACKBONES = {
    "RetinaNet": "build_retinanet_timm_fpn_backbone",
    "GeneralizedRCNN": "build_timm_fpn_backbone",
}


def make_tiny_cfg(arch="RetinaNet", channels=16):
    """Config of a student with 3 classes over mobilenetv3_small_050: p3-p7, or p2-p6 for R-CNN."""
    cfg = get_fgd_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = arch
    cfg.MODEL.BACKBONE.NAME = TINY_BACKBONES[arch]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = channels
    dense = arch == "RetinaNet"
    cfg.MODEL.FPN.IN_FEATURES = (
        ["res3", "res4", "res5"] if dense else ["res2", "res3", "res4", "res5"]
    )
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = 128
    return cfg


@pytest.fixture
def tiny_cfg():
    """The factory `make_tiny_cfg`: call it with an architecture and FPN channels."""
    return make_tiny_cfg


def make_training_batch(sizes=((64, 96), (80, 64)), seed=0):
    """A training batch: random images of these sizes, two boxes each."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 30, 40], [20, 20, 60, 60]]))
        instances.gt_classes = torch.tensor([0, 2])
        image = torch.randint(0, 256, (3, height, width), generator=generator).float()
        # For methods that ask for it.
        second = (image + 8 * torch.randn(image.shape, generator=generator)).clamp(0, 255)
        batch.append({"image": image, "instances": instances, "second_image": second})
    return batch


@pytest.fixture
def make_batch():
    """`make_training_batch`: ``make_batch([(64, 96), (80, 64)])``, two boxes per image."""
    return make_training_batch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_loggers():
    """Detectron2 sets loggers up once per process, on the stdout of that moment. Pytest closes it
    after the test, and a later test would find errors of logging in its own output.
    """
    yield
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "fgd"):
        logger = logging.getLogger(name)
        logger.propagate = True
        logger.filters.clear()
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
