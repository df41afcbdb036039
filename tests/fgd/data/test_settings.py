import logging

import pytest

from fgd.config import get_fgd_cfg
from fgd.data.settings import check_images, check_sets
from fgd.errors import UserError


def cfg_of(*opts, architecture="RetinaNet"):
    cfg = get_fgd_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.mark.parametrize(
    "opts, message",
    [
        (("INPUT.FORMAT", "XYZ"), "INPUT.FORMAT: 'XYZ' is none of BGR, RGB, YUV-BT.601, L"),
        (("MODEL.PIXEL_MEAN", []), "MODEL.PIXEL_MEAN: [] has 0 values; images of INPUT.FORMAT BGR"),
        (("MODEL.PIXEL_STD", [1.0]), "MODEL.PIXEL_STD: [1.0] has 1 values; images of INPUT.FORMAT"),
        (("MODEL.PIXEL_MEAN", [[], 1, 2]), "MODEL.PIXEL_MEAN: [[], 1, 2]; expected one number per"),
        (("MODEL.PIXEL_STD", [1, 0, 1]), "MODEL.PIXEL_STD: [1, 0, 1]; images are divided by it"),
        (("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [1.0]), "MODEL.PIXEL_STD: [1.0, 1.0, 1.0] has"),
        (("TEST.DETECTIONS_PER_IMAGE", -1), "TEST.DETECTIONS_PER_IMAGE: -1; RetinaNet needs a num"),
        (("TEST.DETECTIONS_PER_IMAGE", 0), "TEST.DETECTIONS_PER_IMAGE: 0; RetinaNet needs a num"),
    ],
)
def test_what_would_give_wrong_figures_is_named(opts, message):
    with pytest.raises(UserError) as caught:
        check_images(cfg_of(*opts))
    assert str(caught.value).startswith(message)


def test_what_detectron2_can_do_is_left_alone():
    check_images(cfg_of("TEST.DETECTIONS_PER_IMAGE", -1, architecture="GeneralizedRCNN"))
    grey = ("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [9.0], "MODEL.PIXEL_STD", [1.0])
    check_images(cfg_of(*grey))
    check_images(cfg_of("INPUT.FORMAT", "L"))


@pytest.mark.parametrize(
    "opts, training, message",
    [
        (
            ("TRAIN", "a.json"),
            True,
            "no test set given: set DATASETS.JSON.TEST to its COCO JSON, or",
        ),
        (("TRAIN", "a.json"), False, "no test set given: set DATASETS.JSON.TEST to its COCO JSON"),
        (("TEST", "a.json"), True, "no training set given: set DATASETS.JSON.TRAIN to its COCO"),
    ],
)
def test_one_set_of_two_is_asked_for(opts, training, message):
    with pytest.raises(UserError) as caught:
        check_sets(cfg_of(f"DATASETS.JSON.{opts[0]}", opts[1]), training=training)
    assert str(caught.value).startswith(message)


def test_no_set_at_all_is_fine_for_training_and_said(caplog):
    check_sets(cfg_of(), training=True)
    check_sets(cfg_of("DATASETS.JSON.TEST", "a.json"), training=False)
    cfg = cfg_of("DATASETS.JSON.TRAIN", "a.json", "DATASETS.TEST", "()")
    with caplog.at_level(logging.WARNING):
        check_sets(cfg, training=True)
    assert "no test set given, so nothing is evaluated" in caplog.text
    with pytest.raises(UserError, match="--eval-only: no test set given: set DATASETS.JSON.TEST"):
        check_sets(cfg, training=False)
