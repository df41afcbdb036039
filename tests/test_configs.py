"""Every shipped config is read; the COCO configs state the authors' settings and fit together."""

import re
from functools import cache
from pathlib import Path
from typing import List, NamedTuple

import pytest
import torch
from detectron2 import model_zoo, modeling
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from fgd.config import check_config, load_config, student_config
from fgd.detectors.pretrained import timm_normalisation
from fgd.distillation.config import teacher_name
from fgd.distillation.lazy_zoo import TEACHERS
from fgd.distillation.levels import Outputs, head_levels, plan_levels
from fgd.errors import UserError
from fgd.methods import METHOD_REGISTRY

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


class Row(NamedTuple):
    """What the authors' config of a detector says."""

    weights: List[float]  # foreground, background, attention, relation
    temperature: float
    learning_rate: float
    inherit: bool
    levels: List[str]


TWO_STAGE = Row([5e-5, 2.5e-5, 5e-5, 5e-7], 0.5, 0.02, False, ["p2", "p3", "p4", "p5"])
PYRAMID = ["p3", "p4", "p5", "p6", "p7"]
TABLE = {
    "frcnn": TWO_STAGE,
    "mask_rcnn": TWO_STAGE,
    "cascade": TWO_STAGE,
    "retinanet": Row([1e-3, 5e-4, 5e-4, 5e-6], 0.5, 0.01, True, PYRAMID),
    "fcos": Row([1.6e-3, 8e-4, 8e-4, 8e-6], 0.8, 0.01, True, PYRAMID),
    "reppoints": Row([1.6e-3, 8e-4, 8e-4, 8e-6], 0.5, 0.01, True, PYRAMID),
}
# Zoo weights there are none of: a config of this folder trains the teacher.
OWN_TEACHERS = {"fcos": "teacher_fcos", "reppoints": "teacher_reppoints"}


def read(name):
    return load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])


@cache
def built(name, teacher=False):
    """The student of a config, or its teacher, without memory for weights."""
    cfg = read(f"fgd_{name}")
    if teacher and name in OWN_TEACHERS:
        cfg = read(OWN_TEACHERS[name])
    elif teacher:
        cfg = load_config(cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE)
    cfg = student_config(cfg)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_loads_and_passes_the_checks(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    if not teacher_name(cfg):  # small configs take it on the command line
        cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "teacher.pth"
    if "lazy:" in path.read_text() and not hasattr(modeling, "ViT"):
        with pytest.raises(UserError, match="this Detectron2 has no detectron2.*v0.6 lacks"):
            check_config(cfg)
    else:
        check_config(cfg)


@pytest.mark.parametrize(
    "name, teacher, pairs",
    [
        ("fgd_frcnn_vitdet", "cascade_mask_rcnn_vitdet_b", "p2-p2 p3-p3 p4-p4 p5-p5"),
        ("pkd_retinanet_swin", "cascade_mask_rcnn_swin_b_in21k", "p3-p2 p4-p3 p5-p4 p6-p5"),
    ],
)
def test_configs_under_teachers_of_main(name, teacher, pairs):
    """They fit their students; images are no larger than the square of 1024 pixels."""
    cfg, shapes = read(name), {f"p{k}": ShapeSpec(channels=256, stride=2**k) for k in range(2, 7)}
    assert cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE == f"lazy:{teacher}"
    assert teacher_name(cfg) == TEACHERS[teacher].weights
    student = built(name.split("_")[1])
    (levels,) = plan_levels(cfg, Outputs.of(student.backbone), Outputs(shapes, {})).values()
    assert " ".join(f"{x.name}-{x.teacher_name}" for x in levels) == pairs
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == (1024, 1024)
    if hasattr(modeling, "ViT"):
        described = TEACHERS[teacher].describe()
        assert described.backbone.square_pad == 1024 and described.backbone.out_channels == 256


@pytest.mark.parametrize("method", ["fgd", "pkd", "dsi"])
def test_configs_of_vision_transformers_are_a_pair_over_another_student(method):
    cfg, plain = read(f"{method}_frcnn_vit"), read("baseline_frcnn_vit")
    student = student_config(cfg)
    student.OUTPUT_DIR = plain.OUTPUT_DIR
    student.SOLVER.CLIP_GRADIENTS.ENABLED = plain.SOLVER.CLIP_GRADIENTS.ENABLED  # off for PKD
    assert student.dump() == student_config(plain).dump()
    node, under, solver = cfg.MODEL.DISTILLER, read(f"{method}_frcnn").MODEL.DISTILLER, cfg.SOLVER
    assert (node.METHOD, node[node.METHOD]) == (under.METHOD, under[under.METHOD])
    assert (node.INHERIT, solver.IMS_PER_BATCH, solver.MAX_ITER) == (False, 16, 180000)
    rates = solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM
    assert (*rates, solver.LAYER_DECAY) == ("AdamW", 1e-4, 0.1, 0.0, 0.7)
    assert cfg.MODEL.VIT.SQUARE == cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST == 1024
    expected = timm_normalisation("MODEL.TIMM.NAME", cfg.MODEL.TIMM.NAME)
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT) == (*expected, "RGB")
    if method == "dsi":
        assert teacher_name(cfg) == f"timm:{under.TEACHER.TIMM}" and not node.TEACHER.CONFIG_FILE
    else:
        assert teacher_name(cfg) == TEACHERS["mask_rcnn_vitdet_b"].weights
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.DEVICE = False, "meta"
    with torch.device("meta"):
        outputs = Outputs.of(build_model(student_config(cfg)).backbone)
    shapes = {f"p{k}": ShapeSpec(channels=256, stride=2**k) for k in range(2, 7)}
    shapes = {"tokens": ShapeSpec(channels=768, stride=32)} if method == "dsi" else shapes
    (levels,) = plan_levels(cfg, outputs, Outputs(shapes, {})).values()
    found = " ".join(f"{x.name}-{x.teacher_name}" for x in levels)
    assert found == ("tokens-tokens" if method == "dsi" else "p2-p2 p3-p3 p4-p4 p5-p5")


@pytest.mark.parametrize("name", TABLE)
def test_coco_configs_state_the_authors_settings(name):
    cfg, row = read(f"fgd_{name}"), TABLE[name]
    node, solver = cfg.MODEL.DISTILLER, cfg.SOLVER
    assert list(node.FGD.values())[:4] == row.weights
    assert (node.FGD.TEMPERATURE, node.INHERIT) == (row.temperature, row.inherit)
    assert (node.METHOD, node.LEVELS or head_levels(cfg)) == ("FGD", row.levels)
    assert (solver.BASE_LR, solver.IMS_PER_BATCH, solver.MOMENTUM) == (row.learning_rate, 16, 0.9)
    assert (solver.MAX_ITER, solver.STEPS, solver.GAMMA) == (180000, (120000, 165000), 0.1)
    assert (solver.OPTIMIZER, solver.WEIGHT_DECAY, solver.WARMUP_ITERS) == ("SGD", 1e-4, 500)
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 35.0)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("coco_2017_train",), ("coco_2017_val",))


@pytest.mark.parametrize("name", TABLE)
def test_the_arms_differ_in_nothing_but_the_distillation(name):
    plain = student_config(read(f"baseline_{name}"))
    for base in (f"fgd_{name}", f"distil_{name}"):
        student = student_config(read(base))
        student.OUTPUT_DIR = plain.OUTPUT_DIR
        assert student.dump() == plain.dump()


def test_configs_of_methods_add_a_method_to_a_pair_and_name_the_figures():
    """A method's config is a few lines over distil_*.yaml; its figures are marked as published."""
    pairs = {path.stem.removeprefix("distil_") for path in CONFIGS.glob("distil_*.yaml")}
    assert pairs == set(TABLE)
    methods = {name.lower() for name, _ in METHOD_REGISTRY}
    found = set()
    for path in CONFIGS.glob("*.yaml"):
        method, _, pair = path.stem.partition("_")
        if method not in methods:
            continue
        found.add(method)
        text = path.read_text()
        assert pair.split("_")[0] in {name.split("_")[0] for name in pairs}, path
        assert re.search(r'_BASE_: \[?"(distil|fgd|mgd|pkd|dsi)_', text), path
        node = read(path.stem).MODEL.DISTILLER
        assert node.METHOD.lower().split("+")[0] == method, path
        assert "ublished" in text.split("_BASE_")[0], path
        assert len([x for x in text.splitlines() if x and x[0] != "#"]) <= 18, path
    assert "fgd" in found


def test_what_fcos_alone_has():
    for name in ("fgd_fcos", "baseline_fcos", "teacher_fcos"):
        cfg = read(name)
        solver, node = cfg.SOLVER, cfg.MODEL.FCOS
        assert solver.WARMUP_FACTOR == pytest.approx(1 / 3, abs=1e-6)
        assert (solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS) == (2.0, 0.0)
        assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING) == (
            (640, 800),
            "choice",
        )
        assert (node.NMS_THRESH_TEST, node.CENTER_SAMPLING_RADIUS) == (0.6, 1.5)
    for name in sorted(set(TABLE) - {"fcos"}):
        cfg = read(f"fgd_{name}")
        assert (cfg.SOLVER.WARMUP_FACTOR, cfg.INPUT.MIN_SIZE_TRAIN) == (0.001, (800,))
        assert (cfg.SOLVER.BIAS_LR_FACTOR, cfg.SOLVER.WEIGHT_DECAY_BIAS) == (1.0, None)


@pytest.mark.parametrize("name", sorted(set(TABLE) - set(OWN_TEACHERS)))
def test_teacher_weights_belong_to_the_teacher_config(name):
    node = read(f"fgd_{name}").MODEL.DISTILLER.TEACHER
    url = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
    assert node.WEIGHTS == "detectron2://" + url.split("/detectron2/")[1]


@pytest.mark.parametrize("name, teacher", OWN_TEACHERS.items())
def test_own_teacher_is_where_its_config_leaves_it(name, teacher):
    node, cfg = read(f"fgd_{name}").MODEL.DISTILLER.TEACHER, read(teacher)
    assert (node.CONFIG_FILE, node.WEIGHTS) == ("", f"{cfg.OUTPUT_DIR}/model_final.pth")
    assert cfg.MODEL.META_ARCHITECTURE == read(f"fgd_{name}").MODEL.DISTILLER.STUDENT
    assert cfg.MODEL.RESNETS.DEPTH == 101 and "R-101" in cfg.MODEL.WEIGHTS


def test_addresses_in_files_and_comments_are_the_zoos():
    """Alternatives stand in comments, as the lines `…yaml` and `detectron2://…`."""
    found = 0
    for path in FILES:
        for address in re.findall(r"detectron2://([^\s\"]+)", path.read_text()):
            if not address.startswith("ImageNetPretrained/"):
                config = address.rsplit("/", 2)[0] + ".yaml"
                assert model_zoo.get_checkpoint_url(config).endswith(f"/detectron2/{address}")
                model_zoo.get_config_file(config)  # RuntimeError when it is not there
                found += 1
    assert found >= 4


@pytest.mark.parametrize("name", TABLE)
def test_coco_teachers_fit_their_students(name):
    student, teacher = built(name), built(name, teacher=True)
    outputs = [Outputs.of(model.backbone) for model in (student, teacher)]
    (levels,) = plan_levels(read(f"fgd_{name}"), *outputs).values()
    assert [level.name for level in levels] == TABLE[name].levels
    assert {(level.student_channels, level.teacher_channels) for level in levels} == {(256, 256)}


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.inherit])
def test_all_of_neck_and_head_can_be_inherited_where_it_is_on(name):
    shapes = [
        {k: v.shape for k, v in model.state_dict().items() if "bottom_up" not in k}
        for model in (built(name), built(name, teacher=True))
    ]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 20


def test_masks_and_the_cascade_are_where_they_should_be():
    heads = {name: built(name).roi_heads for name in ("frcnn", "mask_rcnn", "cascade")}
    kinds = {name: (type(head).__name__, head.mask_on) for name, head in heads.items()}
    assert kinds == {
        "frcnn": ("StandardROIHeads", False),
        "mask_rcnn": ("StandardROIHeads", True),
        "cascade": ("CascadeROIHeads", False),
    }
    teacher = built("mask_rcnn", teacher=True).roi_heads
    assert (type(teacher).__name__, teacher.mask_on) == ("CascadeROIHeads", True)


STUDIES = ["bccd/{}_retinanet", "nuclei/{}_mask_rcnn"]
PRETRAINED = [*(f"{name}_pretrained" for name in STUDIES), "quick/pretrained_{}_retinanet"]


@pytest.mark.parametrize("name", STUDIES + PRETRAINED)
def test_teacher_and_student_of_a_study_differ_in_backbone_and_length(name):
    teacher, student = (student_config(read(name.format(role))) for role in ("teacher", "fgd"))
    assert teacher.MODEL.TIMM.NAME != student.MODEL.TIMM.NAME
    assert teacher.SOLVER.MAX_ITER > student.SOLVER.MAX_ITER
    teacher.MODEL.TIMM.NAME, teacher.OUTPUT_DIR = student.MODEL.TIMM.NAME, student.OUTPUT_DIR
    teacher.SOLVER.MAX_ITER = student.SOLVER.MAX_ITER
    teacher.MODEL.TIMM.PRETRAINED = student.MODEL.TIMM.PRETRAINED
    assert teacher == student


@pytest.mark.parametrize("name", PRETRAINED)
@pytest.mark.parametrize("role", ["teacher", "fgd"])
def test_a_pretrained_config_has_what_its_weights_expect(name, role, caplog):
    model = build_model(student_config(read(name.format(role))))
    assert "the weights expect" not in caplog.text
    assert model.backbone.bottom_up.expected == ([127.0] * 3, [128.0] * 3)
