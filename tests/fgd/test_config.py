import sys

import pytest
import yaml
from detectron2.config import get_cfg

from fgd.config import (
    add_fgd_config,
    check_config,
    get_fgd_cfg,
    load_config,
    load_config_text,
    student_config,
)
from fgd.errors import UserError


def test_the_model_zoo_is_readable_although_it_holds_an_eval_tag():
    cfg = load_config("COCO-Detection/retinanet_R_101_FPN_3x.yaml")
    assert cfg.MODEL.RESNETS.DEPTH == 101
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == pytest.approx([32, 40.3174736, 50.7968337])


def test_file_then_options(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("VERSION: 2\nMODEL: {DISTILLER: {FGD: {TEMPERATURE: 0.8}}}\n")
    cfg = load_config(str(path), ["MODEL.DISTILLER.INHERIT", "True"])
    assert cfg.MODEL.DISTILLER.FGD.TEMPERATURE == 0.8
    assert cfg.MODEL.DISTILLER.INHERIT is True


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL: {DISTILLER: {INHERRIT: True}}", "c.yaml: .*MODEL.DISTILLER.INHERRIT"),
        ("MODEL: {DISTILLER: {LEVELS: 3}}", "c.yaml: .*LEVELS"),
        ("- 1", "c.yaml"),
    ],
)
def test_errors_name_the_file_and_the_key(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("VERSION: 2\n" * (text[0] != "-") + text)
    with pytest.raises(UserError, match=message):
        load_config(str(path))


def test_errors_of_command_line_and_missing_file():
    with pytest.raises(UserError, match=r"command line: .*MODEL\.FOO"):
        load_config("", ["MODEL.FOO", "1"])
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("SOLVER: {BASE_LR: .inf}", "SOLVER.BASE_LR: inf is no number to calculate with"),
        ("MODEL: {PIXEL_STD: [1, .nan]}", "MODEL.PIXEL_STD: nan is no number to calculate with"),
        (f"SOLVER: {{MAX_ITER: {10**390}}}", " is no number to calculate with"),
        ("SOLVER: {STEPS: null}", "SOLVER.STEPS: null; expected a value as (30000,)"),
        ("SOLVER: {STEPS: [a]}", "SOLVER.STEPS: ('a',); expected numbers"),
        ("DATASETS: {TRAIN: [{a: 1}]}", "expected texts"),
        ("OUTPUT_DIR: ~no_such_user/x", "OUTPUT_DIR ~no_such_user/x: there is no such home folder"),
    ],
)
def test_values_that_yacs_takes_and_nothing_can_use(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"VERSION: 2\n{text}")
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert message in str(caught.value) and "c.yaml: " in str(caught.value)


def test_a_text_that_begins_with_a_tilde_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "c.yaml"
    path.write_text("VERSION: 2\nOUTPUT_DIR: ~/x\nDATASETS: {JSON: {TRAIN: ~/t.json}}\n")
    cfg = load_config("~/c.yaml", ["MODEL.WEIGHTS", "~/w.pth"])
    assert cfg.OUTPUT_DIR == f"{tmp_path}/x" and cfg.DATASETS.JSON.TRAIN == f"{tmp_path}/t.json"
    assert cfg.MODEL.WEIGHTS == f"{tmp_path}/w.pth"


def test_student_config_builds_the_student_alone():
    cfg = get_fgd_cfg()
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.STUDENT = "GeneralizedRCNN"
    cfg.freeze()
    student = student_config(cfg)
    assert student.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert "DISTILLER" not in student.MODEL and "DISTILLER" in cfg.MODEL
    again = load_config_text(student.dump(), "checkpoint")
    assert again.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    plain = lambda c: yaml.safe_load(c.dump())  # noqa: E731
    assert plain(student_config(again)) == plain(student)


def test_add_fgd_config_works_on_a_stock_config():
    cfg = get_cfg()
    add_fgd_config(cfg)
    assert cfg.MODEL.DISTILLER.FGD.FOREGROUND_WEIGHT == 1e-3


def test_a_whole_number_is_a_fraction_too(tmp_path):
    """On the command line, in a file, in a checkpoint; a fraction is no whole number."""
    path = tmp_path / "run.yaml"
    path.write_text("DOCTOR:\n  MIN_AP50: 0\nSOLVER:\n  BASE_LR: 1\n")
    for cfg in (
        load_config(str(path)),
        load_config(opts=["DOCTOR.MIN_AP50", "0", "SOLVER.BASE_LR", 1]),
        load_config_text(path.read_text(), "checkpoint"),
    ):
        found = cfg.DOCTOR.MIN_AP50, cfg.SOLVER.BASE_LR
        assert found == (0.0, 1.0) and set(map(type, found)) == {float}
    for key, value in (("DOCTOR.IMAGES", "8.0"), ("DOCTOR.MIN_AP50", "True")):
        with pytest.raises(UserError, match=f"command line: Type mismatch.*{key}"):
            load_config(opts=[key, value])


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("STUDENT", "Distiller", "not a student"),
        ("STUDENT", "Nonsense", "'Nonsense'"),
        ("METHOD", "", "nothing is distilled"),
        ("METHOD", "XYZ", "'XYZ' is unknown; there is .*FGD"),
        ("LEVEL_MAP", ["p3"], "LEVEL_MAP: 'p3' is not of the form"),
        ("FEATURES", "neck", "FEATURES: 'neck' is not one of"),
        ("FACTOR", -1.0, "FACTOR: -1.0 is not a finite factor"),
        ("SCHEDULE.DECAY", "cosine", "SCHEDULE.DECAY"),
        ("PICTURE_PERIOD", -1, "PICTURE_PERIOD: -1 must be 0"),
        ("FGD.TEMPERATURE", 0.0, "not above 0"),
        ("FGD.RELATION_WEIGHT", -1.0, "RELATION_WEIGHT"),
        ("FGD.ATTENTION_WEIGHT", float("nan"), "ATTENTION_WEIGHT"),
        ("FGD.MASK_REFERENCE", "both", "neither"),
        ("FGD.IMPLEMENTATION", "cuda", "IMPLEMENTATION: 'cuda' is none of 'torch', 'triton'"),
        ("TEACHER.WEIGHTS", "", "WEIGHTS is empty"),
        ("TEACHER.PRECISION", "half", "'half' is not one of float32, bfloat16, float16"),
    ],
)
def test_check_config_names_the_key(key, value, message):
    cfg = get_fgd_cfg()
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "teacher.pth"
    check_config(cfg)
    cfg.merge_from_list([f"MODEL.DISTILLER.{key}", value])
    with pytest.raises(UserError, match=message):
        check_config(cfg)


def test_triton_needs_cuda_and_triton(monkeypatch):
    cfg = get_fgd_cfg()
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "teacher.pth"
    cfg.MODEL.DISTILLER.FGD.IMPLEMENTATION = "triton"
    cfg.MODEL.DEVICE = "cuda"
    check_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(UserError, match="IMPLEMENTATION triton needs MODEL.DEVICE cuda, found cpu"):
        check_config(cfg)
    cfg.MODEL.DEVICE = "cuda"
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fgd.methods.fgd.sweep_triton")
    monkeypatch.delattr("fgd.methods.fgd.sweep_triton")
    with pytest.raises(UserError, match="IMPLEMENTATION triton: .*triton"):
        check_config(cfg)


def test_a_float16_teacher_needs_cuda():
    cfg = get_fgd_cfg()
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "teacher.pth"
    cfg.MODEL.DISTILLER.TEACHER.PRECISION = "float16"
    cfg.MODEL.DEVICE = "cuda:1"
    check_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(UserError, match="PRECISION: 'float16' needs CUDA.*'cpu'.*bfloat16"):
        check_config(cfg)
    cfg.MODEL.DISTILLER.TEACHER.PRECISION = "bfloat16"
    check_config(cfg)
