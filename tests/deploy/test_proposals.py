"""--proposals: the graph, Detectron2 beside it, and model.json all have the number asked for."""

import numpy as np
import pytest

from deploy.checks.verification import verify
from deploy.evaluate import load_eager
from deploy.export import main
from deploy.load import load_student
from deploy.runtime import OrtDetector

from .conftest import conditioned, save_checkpoint, toy_cfg

FEWER = 12


@pytest.fixture(scope="module")
def exported_with_fewer(export_tiny):
    """From a config with 100."""
    return export_tiny(toy_cfg("GeneralizedRCNN"), "--proposals", str(FEWER))


def test_it_is_recorded_and_reaches_graph_and_detectron2(exported_with_fewer):
    made = exported_with_fewer
    spec = made.spec
    assert spec.proposals == FEWER == OrtDetector(made.path).spec.proposals
    rpn = load_eager(made.checkpoint, spec).student.model.proposal_generator
    assert rpn.post_nms_topk[False] == FEWER
    assert load_student(made.checkpoint).model.proposal_generator.post_nms_topk[False] == 100


def test_the_verifier_tells_it_from_the_config_s_number(exported_with_fewer):
    made = exported_with_fewer
    as_asked = load_student(made.checkpoint, proposals=FEWER).model
    assert verify(as_asked, made.path, made.spec).passed
    as_trained = load_student(made.checkpoint).model
    report = verify(as_trained, made.path, made.spec)
    assert not report.passed and report.tally.unmatched


def test_fewer_proposals_give_fewer_detections(exported_with_fewer, tiny):
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    few, many = (
        len(OrtDetector(made.path).detect([image])[0].scores)
        for made in (exported_with_fewer, tiny("Faster R-CNN"))
    )
    assert 0 < few < many and few <= FEWER * len(exported_with_fewer.spec.classes)


@pytest.mark.parametrize(
    "arch, number, message", [("RetinaNet", 10, "has no"), ("GeneralizedRCNN", 0, "too small")]
)
def test_a_number_that_makes_no_sense_is_refused(tmp_path, capsys, arch, number, message):
    cfg = toy_cfg(arch)
    path = save_checkpoint(conditioned(cfg), cfg, tmp_path / "student.pth")
    assert main([str(path), "--proposals", str(number)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--proposals {number}" in line and message in line
    assert not (tmp_path / "student_onnx").exists()
