"""The configs: they load, say what they should for each detector, and survive any name."""

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.config import check_config, load_config
from fgd.start import recipe
from fgd.start.anchors import choose
from fgd.start.families import DETECTORS
from fgd.start.recipe import Recipe, are_alike, batch_size
from fgd.start.survey import InputSize, input_size, levels
from fgd.start.yaml_text import Value, yaml_text

from .drawn import surveyed

HOSTILE = ["a\nMODEL: {WEIGHTS: x}", "#", "b: [", "é\x85\u2028\ufeff\uffff", "!!python/name:os.x"]


def a_recipe(folder, detector="retinanet", classes=HOSTILE, **options):
    boxes = [[(i % len(classes), 8, 8, 20, 24)] for i in range(8)]
    survey = surveyed(folder, sizes=[(96, 64)] * 8, boxes=boxes, classes=classes)
    own, size = DETECTORS[detector], input_size(survey)
    found = levels(survey.sides(size), own.two_stage)
    anchors = choose(survey.scaled(size), found.strides, own.two_stage) if own.anchored else None
    sets = {"TRAIN": "/data: #1/[a].json", "TEST": "/data/test.json"}
    given = {"pretrained": False, "alike": False, "batch": 4, "iterations": (300, 500), **options}
    out = "mine: #1"
    return Recipe(own, survey, size, found, anchors, sets, out, "cpu", **given)


def loaded(folder, own):
    for name, text in own.texts().items():
        (folder / name).write_text(text)
    names = (recipe.STUDENT, recipe.TEACHER, recipe.DISTIL)
    configs = [load_config(str(folder / name)) for name in names]
    for cfg in configs:
        check_config(cfg)
    return configs


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_configs_load(detector, tmp_path):
    own = a_recipe(tmp_path, detector, mask_format="polygon" if detector == "mask_rcnn" else "")
    student, teacher, distil = loaded(tmp_path, own)
    architecture = DETECTORS[detector].architecture
    assert student.MODEL.META_ARCHITECTURE == teacher.MODEL.META_ARCHITECTURE == architecture
    assert distil.MODEL.META_ARCHITECTURE == "Distiller"
    assert distil.MODEL.DISTILLER.STUDENT == architecture
    node = "ROI_HEADS" if DETECTORS[detector].two_stage else architecture.upper()
    assert student.MODEL[node].NUM_CLASSES == 5
    assert student.MODEL[node].IN_FEATURES == ["p3", "p4", "p5"]
    assert student.MODEL.MASK_ON == (detector == "mask_rcnn")
    assert [cfg.SOLVER.MAX_ITER for cfg in (student, teacher, distil)] == [300, 500, 300]
    assert [cfg.SOLVER.WARMUP_ITERS for cfg in (student, teacher, distil)] == [50, 50, 50]
    assert (student.TEST.EVAL_PERIOD, teacher.TEST.EVAL_PERIOD) == (60, 0)
    assert [cfg.OUTPUT_DIR for cfg in (student, teacher)] == [
        "mine: #1/student",
        "mine: #1/teacher",
    ]
    assert student.DATASETS.JSON.TRAIN == "/data: #1/[a].json"
    assert (student.INPUT.MIN_SIZE_TRAIN, student.INPUT.MAX_SIZE_TEST) == ((64,), 96)
    assert teacher.MODEL.TIMM.NAME == "resnet18" and student.MODEL.TIMM.NORM == "GN"
    other = student.clone()
    other.MODEL.META_ARCHITECTURE = "Distiller"
    other.MODEL.DISTILLER, other.OUTPUT_DIR = distil.MODEL.DISTILLER, distil.OUTPUT_DIR
    assert other == distil


def test_every_line_says_why_or_is_plain(tmp_path):
    text = a_recipe(tmp_path).texts()["student.yaml"]
    reasons = {
        "SIZES": "k-means', which 100.0% of boxes meet at IoU 0.5; Detectron2's ",
        "NUM_CLASSES": r"a MODEL: {WEIGHTS: x}, #, b: [, é ??, !!python/name:os.x",
        "MIN_SIZE_TRAIN": "the smallest class, ",
        "DETECTIONS_PER_IMAGE": "at most 1 boxes",
    }
    for key, reason in reasons.items():
        (line,) = (x for x in text.splitlines() if x.strip().startswith(f"{key}:"))
        assert f"  # {reason}" in line


def test_pretrained(tmp_path):
    own = a_recipe(tmp_path, pretrained=True, alike=True, batch=8)
    student, teacher, _ = loaded(tmp_path, own)
    assert student.MODEL.TIMM.PRETRAINED == "package:efficientnet_lite0"
    assert teacher.MODEL.TIMM.NAME == "tf_efficientnet_lite2"
    for cfg in (student, teacher):
        assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD) == ("RGB", [128.0] * 3)
        assert (cfg.MODEL.TIMM.NORM, cfg.MODEL.FPN.NORM) == ("BN", "BN")
        assert cfg.SOLVER.BASE_LR == 0.001
    own.batch = 4  # too few for batch norms
    student, _, _ = loaded(tmp_path, own)
    assert (student.MODEL.TIMM.NORM, student.MODEL.FPN.NORM) == ("FrozenBN", "GN")


@pytest.mark.parametrize(
    "short, long, two_stage, images, batch",
    [
        (240, 320, False, 205, 8),  # configs/bccd
        (256, 352, True, 192, 4),  # configs/nuclei
        (96, 96, False, 2000, 16),  # configs/quick
        (800, 1344, False, 500, 1),
        (240, 320, False, 5, 4),
        (240, 320, False, 1, 1),
    ],
)
def test_batch_size(short, long, two_stage, images, batch):
    size = InputSize(short, long, "landscape", ("a", 20.0))
    assert batch_size(size, two_stage, images) == batch


def test_images_are_alike_by_their_mean_grey():
    assert are_alike(np.array([100.0, 130, 115])) and not are_alike(np.array([20.0, 180]))


@settings(max_examples=30)
@given(st.text(), st.text(), st.text() | st.lists(st.text() | st.integers() | st.floats(-9, 9)))
def test_values_come_back_and_comments_end_with_their_line(header, why, value):
    text = yaml_text(header, [Value("A.B.C", value, why), Value("A.D", 1, why), Value("E", "x")])
    assert yaml.safe_load(text) == {"A": {"B": {"C": value}, "D": 1}, "E": "x"}
