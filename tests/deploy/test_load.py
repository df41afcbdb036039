import importlib.util

import pytest
import torch
from detectron2.modeling import build_model

from deploy.load import load_student

from .conftest import CLASSES, save_checkpoint, toy_cfg


@pytest.fixture(scope="module")
def student():
    cfg = toy_cfg("RetinaNet")
    return build_model(cfg), cfg


def refused(path, match, **options):
    """The message; every refusal carries exit code 2 and is one line."""
    with pytest.raises(ValueError, match=match) as caught:
        load_student(path, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_loads_everything_from_the_checkpoint(student, tmp_path):
    model, cfg = student
    loaded = load_student(save_checkpoint(model, cfg, tmp_path / "a.pth"))
    assert loaded.classes == CLASSES and not loaded.model.training
    assert loaded.config_source == f"{tmp_path / 'a.pth'} (key 'config')"
    assert loaded.dropped == {"distiller": (1, 140)}
    assert len(loaded.checkpoint_sha256) == 64
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_student_from_a_packages_weights_needs_no_package(tmp_path, monkeypatch):
    """Frozen batch norms ask for weights in a training alone."""
    cfg = toy_cfg("RetinaNet")
    node = cfg.MODEL.TIMM
    node.NAME, node.NORM = "tf_efficientnet_lite0", "FrozenBN"
    node.PRETRAINED = "package:efficientnet_lite0"
    model = build_model(cfg)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    loaded = load_student(save_checkpoint(model, cfg, tmp_path / "a.pth"))
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_config_is_looked_for_beside_the_file_then_asked_for(student, tmp_path):
    model, cfg = student
    path = save_checkpoint(model, cfg, tmp_path / "a.pth", config=None)
    refused(path, r"key 'config'.*config\.yaml.*--config-file")
    (tmp_path / "given.yaml").write_text(cfg.dump())
    given = str(tmp_path / "given.yaml")
    assert load_student(path, config_file=given).config_source == given
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert load_student(path).config_source == str(tmp_path / "config.yaml")


def test_a_training_config_gives_the_student(student, tmp_path):
    """config.yaml as Detectron2 writes it while distilling."""
    model, cfg = student
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DISTILLER.STUDENT = "Distiller", "RetinaNet"
    path = save_checkpoint(model, cfg, tmp_path / "a.pth")
    assert type(load_student(path).model).__name__ == "RetinaNet"


def test_score_threshold_replaces_the_configs(student, tmp_path):
    path = save_checkpoint(*student, tmp_path / "a.pth")
    assert load_student(path).model.test_score_thresh == 0.05
    assert load_student(path, score_threshold=0.3).model.test_score_thresh == 0.3
    refused(path, "1.5", score_threshold=1.5)


def test_class_names_without_a_list_and_of_a_wrong_number(student, tmp_path):
    path = save_checkpoint(*student, tmp_path / "a.pth", classes=None)
    assert load_student(path).classes == ["class_0", "class_1", "class_2"]
    refused(save_checkpoint(*student, tmp_path / "a.pth", classes=["cat"]), "1 class names.*3")


def test_unknown_architectures_are_refused_with_the_list(student, tmp_path):
    model, cfg = student
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    path = save_checkpoint(model, cfg, tmp_path / "a.pth")
    refused(path, "'PanopticFPN'.*FCOS, GeneralizedRCNN, RepPoints, RetinaNet")


def test_weights_that_are_missing_foreign_or_left_over_are_named(student, tmp_path):
    model, cfg = student
    state = model.state_dict()
    partial = {name: value for name, value in state.items() if "cls_score" not in name}
    teacher = {**state, "teacher.backbone.weight": torch.zeros(1)}
    damaged = {**state, "head.cls_score.bias": state["head.cls_score.bias"] * float("nan")}
    for weights, match in (
        (partial, "2 not in the file.*head.cls_score.bias"),
        (teacher, "1 weights belong to no part.*teacher.backbone.weight"),
        (damaged, "1 with NaN.*head.cls_score.bias"),
    ):
        refused(save_checkpoint(model, cfg, tmp_path / "a.pth", model=weights), match)


def test_constants_that_older_files_hold_are_accepted(student, tmp_path):
    model, cfg = student
    weights = {**model.state_dict(), "pixel_mean": model.pixel_mean}
    path = save_checkpoint(model, cfg, tmp_path / "a.pth", model=weights)
    assert load_student(path).classes == CLASSES


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    refused(tmp_path / "nothing.pth", "no such checkpoint")
    (tmp_path / "notes.txt").write_text("not weights")
    refused(tmp_path / "notes.txt", "notes.txt")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    refused(tmp_path / "page.pth", "web page")
    torch.save({"state_dict": {"backbone.w": torch.zeros(1)}}, tmp_path / "mmdet.pth")
    refused(tmp_path / "mmdet.pth", "MMDetection")


def test_a_config_file_is_compared_with_that_of_the_training(student, tmp_path, capsys):
    model, cfg = student
    path = save_checkpoint(model, cfg, tmp_path / "a.pth")
    other = cfg.clone()
    other.INPUT.MIN_SIZE_TEST, other.MODEL.WEIGHTS = 31, "elsewhere.pth"
    (tmp_path / "sizes.yaml").write_text(other.dump())
    load_student(path, config_file=str(tmp_path / "sizes.yaml"))
    said = f"INPUT.MIN_SIZE_TEST 31 (trained with {cfg.INPUT.MIN_SIZE_TEST})"
    assert said in capsys.readouterr().err
    other.INPUT.FORMAT = "RGB"
    (tmp_path / "rgb.yaml").write_text(other.dump())
    refused(path, r"INPUT.FORMAT 'RGB' \(trained with 'BGR'\)", config_file=tmp_path / "rgb.yaml")


def test_a_grey_detector_and_an_open_number_of_detections_are_refused_by_name(tmp_path):
    cfg = toy_cfg("GeneralizedRCNN")
    model = build_model(cfg)
    cfg.TEST.DETECTIONS_PER_IMAGE = -1
    path = save_checkpoint(model, cfg, tmp_path / "a.pth")
    refused(path, r"TEST.DETECTIONS_PER_IMAGE -1 \(all\) cannot be exported: .* --config-file")
    cfg.INPUT.FORMAT = "L"
    path = save_checkpoint(model, cfg, tmp_path / "b.pth")
    refused(path, r"key 'config'\): INPUT.FORMAT L cannot be exported: .* BGR or RGB")
