"""Settings of images and test sets that Detectron2 takes, and that give no or wrong figures."""

import logging
import math

from detectron2.config import CfgNode

from ..config import student_config
from ..errors import UserError

__all__ = ["check_images", "check_sets"]

# Numbers of channels that a network may be normalised for. A grey image stands for all of three.
_CHANNELS = {"BGR": (3,), "RGB": (3,), "YUV-BT.601": (3,), "L": (1, 3)}
_GIVEN = "shapes_train", "shapes_test"  # the generated sets, which a config without others gets

logger = logging.getLogger(__name__)


def check_images(cfg: CfgNode) -> None:
    """Raise UserError if images cannot be read or normalised so, or detections would be lost."""
    kind, mean, std = cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if kind not in _CHANNELS:
        raise UserError(f"INPUT.FORMAT: {kind!r} is none of {', '.join(_CHANNELS)}")
    for key, values in (("PIXEL_MEAN", mean), ("PIXEL_STD", std)):
        if len(values) not in _CHANNELS[kind] or len(values) != len(mean):
            counts = " or ".join(map(str, _CHANNELS[kind]))
            raise UserError(
                f"MODEL.{key}: {list(values)} has {len(values)} values; images of INPUT.FORMAT "
                f"{kind} have {counts} channels, and PIXEL_MEAN and PIXEL_STD as many values"
            )
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in values):
            raise UserError(f"MODEL.{key}: {list(values)}; expected one number per channel")
    if not all(std):
        raise UserError(f"MODEL.PIXEL_STD: {list(std)}; images are divided by it, so 0 cannot be")
    most, architecture = cfg.TEST.DETECTIONS_PER_IMAGE, student_config(cfg).MODEL.META_ARCHITECTURE
    # To R-CNN a number below 0 means all; dense detectors would leave out their last ones.
    if most == 0 or (most < 0 and architecture != "GeneralizedRCNN"):
        raise UserError(
            f"TEST.DETECTIONS_PER_IMAGE: {most}; {architecture} needs a number from 1 on, "
            "Detectron2's is 100"
        )


def check_sets(cfg: CfgNode, *, training: bool) -> None:
    """Raise UserError if one of two sets is the user's and the other one the generated shapes, or
    nothing is to be evaluated; a training without evaluation is said in the log.
    """
    train, test = cfg.DATASETS.JSON.TRAIN, cfg.DATASETS.JSON.TEST
    if train and not test and tuple(cfg.DATASETS.TEST) == (_GIVEN[1],):
        without = ', or DATASETS.TEST "()" to train without evaluation' if training else ""
        raise UserError(f"no test set given: set DATASETS.JSON.TEST to its COCO JSON{without}")
    if training and test and not train and tuple(cfg.DATASETS.TRAIN) == (_GIVEN[0],):
        raise UserError("no training set given: set DATASETS.JSON.TRAIN to its COCO JSON")
    if test or cfg.DATASETS.TEST:
        return
    if not training:
        raise UserError("--eval-only: no test set given: set DATASETS.JSON.TEST to its COCO JSON")
    logger.warning("no test set given, so nothing is evaluated; DATASETS.JSON.TEST sets one")
