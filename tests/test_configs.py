"""Every shipped config is read, and builds at least its backbone table."""

from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.modeling import build_backbone

from fgd.config import check_config, load_config, student_config
from fgd.features import distilled_level_names, match_levels
from fgd.solver import check_solver

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_loads_and_passes_the_checks(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    check_solver(cfg)
    if not cfg.MODEL.DISTILLER.TEACHER.WEIGHTS:  # small configs take it on the command line
        cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "teacher.pth"
    check_config(cfg)


@pytest.mark.parametrize("name", ["frcnn", "retinanet"])
def test_coco_configs_state_the_papers_settings(name):
    cfg, base = (load_config(str(CONFIGS / f"{x}_{name}.yaml")) for x in ("fgd", "baseline"))
    node = cfg.MODEL.DISTILLER
    weights = list(node.FGD.values())[:4]
    expected = {"frcnn": [5e-5, 2.5e-5, 5e-5, 5e-7], "retinanet": [1e-3, 5e-4, 5e-4, 5e-6]}
    assert weights == expected[name]
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (180000, (120000, 165000))
    assert (cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE) == (
        "full_model",
        35.0,
    )
    assert node.TEACHER.WEIGHTS.endswith(
        model_zoo.get_checkpoint_url(node.TEACHER.CONFIG_FILE).split("/detectron2/")[1]
    )
    # The two arms differ in nothing but the distillation.
    student, plain = student_config(cfg), student_config(base)
    student.OUTPUT_DIR = plain.OUTPUT_DIR
    assert student.dump() == plain.dump()


@pytest.mark.parametrize("name", ["frcnn", "retinanet"])
def test_coco_teachers_fit_their_students(name):
    cfg = load_config(str(CONFIGS / f"fgd_{name}.yaml"))
    teacher = load_config(cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE)
    shapes = [build_backbone(c).output_shape() for c in (cfg, teacher)]
    levels = match_levels(distilled_level_names(cfg), *shapes)
    count = {"frcnn": ["p2", "p3", "p4", "p5"], "retinanet": ["p3", "p4", "p5", "p6", "p7"]}
    assert [level.name for level in levels] == count[name]
    assert {(level.student_channels, level.teacher_channels) for level in levels} == {(256, 256)}
