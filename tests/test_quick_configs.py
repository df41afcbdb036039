"""The quick configs: each trains, and teacher and student fit together."""

from pathlib import Path

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgd.config import load_config, student_config
from fgd.data.checks import check_class_count
from fgd.data.datasets import register_from_config

FOLDER = Path(__file__).parent.parent / "configs" / "quick"
ROLES = ("teacher", "student", "fgd")
DETECTORS = sorted(path.stem.split("_", 2)[2] for path in FOLDER.glob("shapes_fgd_*.yaml"))


def quick_cfg(role, detector, opts=()):
    return load_config(str(FOLDER / f"shapes_{role}_{detector}.yaml"), opts)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """detector -> checkpoint of an untrained teacher, as the trainer writes them."""
    folder, paths = tmp_path_factory.mktemp("teachers"), {}
    for detector in DETECTORS:
        cfg = quick_cfg("teacher", detector)
        torch.manual_seed(0)
        paths[detector] = str(folder / f"{detector}.pth")
        content = {"model": build_model(cfg).state_dict(), "config": student_config(cfg).dump()}
        torch.save(content, paths[detector])
    return paths


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("role", ROLES)
def test_one_step_on_generated_shapes(role, detector, teachers, tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "2"]
    opts += ["DATASETS.SHAPES.TRAIN_IMAGES", "4", "DATASETS.SHAPES.TEST_IMAGES", "2"]
    if role == "fgd":
        opts += ["MODEL.DISTILLER.TEACHER.WEIGHTS", teachers[detector]]
    cfg = register_from_config(quick_cfg(role, detector, opts))
    assert check_class_count(cfg) == ["circle", "triangle", "square"]
    batch = next(iter(build_detection_train_loader(cfg)))
    assert [tuple(x["image"].shape) for x in batch] == [(3, 96, 96)] * 2
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    distilled = sorted(name for name in losses if name.startswith("loss_fgd_"))
    terms = ("attention", "background", "foreground", "relation")
    assert distilled == ([f"loss_fgd_{term}" for term in terms] if role == "fgd" else [])
    assert ("loss_mask" in losses) == (detector == "mask_rcnn")


def test_none_is_missing():
    named = {"retinanet", "frcnn", "mask_rcnn", "cascade", "fcos", "reppoints", "frcnn_vit"}
    assert named <= set(DETECTORS)


@pytest.mark.parametrize("detector", DETECTORS)
def test_arms_share_everything_but_backbone_and_distiller(detector):
    teacher, student, fgd = (student_config(quick_cfg(role, detector)) for role in ROLES)
    fgd.OUTPUT_DIR = teacher.OUTPUT_DIR = student.OUTPUT_DIR
    assert fgd == student
    teacher.MODEL.TIMM.NAME, teacher.SOLVER.MAX_ITER = student.MODEL.TIMM.NAME, 600
    if detector == "mask_rcnn":  # under a Cascade Mask R-CNN
        assert teacher.MODEL.ROI_HEADS.NAME == "CascadeROIHeads" and teacher.MODEL.MASK_ON
        teacher.MODEL.ROI_HEADS.NAME = student.MODEL.ROI_HEADS.NAME
        teacher.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False
    assert teacher == student


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_teacher_is_larger(detector):
    teacher, student = (
        sum(p.numel() for p in build_model(quick_cfg(role, detector)).parameters())
        for role in ("teacher", "student")
    )
    assert teacher > 3 * student and student < 2e6


@pytest.mark.parametrize("detector", DETECTORS)
def test_inheriting_is_on_where_head_and_neck_fit(detector):
    node = quick_cfg("fgd", detector).MODEL.DISTILLER
    assert node.INHERIT == (detector != "mask_rcnn")
    if not node.INHERIT:
        return
    teacher, student = (build_model(quick_cfg(role, detector)) for role in ("teacher", "student"))
    shapes = {k: v.shape for k, v in student.state_dict().items() if ".bottom_up." not in k}
    larger = {k: v.shape for k, v in teacher.state_dict().items() if ".bottom_up." not in k}
    assert shapes.keys() == larger.keys()
    differing = {k for k in shapes if shapes[k] != larger[k]}
    # What sees the backbones' own channels.
    own = [f"fpn_lateral{level}.weight" for level in (3, 4, 5)]
    if detector == "frcnn_vit":
        own = ["3.0.weight", "3.0.bias", "3.1.weight", "4.0.weight", "5.1.weight"]
        own = [f"simfp_{name}" for name in own]
    assert differing == {f"backbone.{name}" for name in own}
