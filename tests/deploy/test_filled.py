"""--filled: the graph for images that fill its canvas."""

import numpy as np
import onnx
import pytest

from deploy.checks.verify_images import verification_batches
from deploy.errors import UserError
from deploy.export import main
from deploy.runtime import OrtDetector
from deploy.serving.preprocess import prepare

from .conftest import (
    CANVAS,
    assert_equal_detections,
    conditioned,
    detectron2_outputs,
    make_cfg,
    ort_outputs,
    save_checkpoint,
    scenes,
    toy_cfg,
)

FILLING = [CANVAS, (65, 128), (96, 97), (65, 97)]  # rounded up to 32


@pytest.fixture(scope="module")
def filled(export_tiny):
    return export_tiny(make_cfg("RetinaNet"), "--filled")


def test_its_detections_are_detectron2s_alone(filled):
    images = scenes(4, seed=3)
    outputs = ort_outputs(filled.path, images, FILLING)
    assert_equal_detections(outputs, detectron2_outputs(filled.model, images, FILLING))


def test_it_masks_nothing(filled, exported):
    nodes, others = (
        [node.op_type for node in onnx.load(made.path).graph.node]
        for made in (filled, exported("RetinaNet"))
    )
    assert nodes.count("Mul") < others.count("Mul") - 20
    sizes = {
        tuple(size) for batch in verification_batches(filled.spec) for size in batch.image_sizes
    }
    assert sizes == set(FILLING)


@pytest.mark.parametrize("size", [(64, 128), (96, 96), (32, 32)])
def test_other_images_are_marked_by_the_graph_and_refused_by_the_client(filled, size):
    images = scenes(2, seed=3)
    count, _, scores, _ = ort_outputs(filled.path, images, [size, CANVAS])
    assert np.isnan(scores[0]).all() and not np.isnan(scores[1]).any() and count[1] > 0
    image = np.zeros((*size, 3), np.uint8)
    spec = filled.spec
    spec.min_size = 0
    with pytest.raises(UserError, match="does not fill the canvas of 96x128; export without --fil"):
        prepare(image, spec)
    assert "less than 32 below it" in str(spec.interface()["inputs"])
    detector = OrtDetector(filled.path)
    assert len(detector.detect([np.zeros((*CANVAS, 3), np.uint8)])) == 1


def test_without_a_canvas_it_is_refused(filled, tmp_path, capsys):
    options = ["--filled", "--dynamic", "image", "--output", str(tmp_path)]
    assert main([str(filled.checkpoint), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--filled needs a fixed canvas" in line


def test_a_graph_that_padding_changes_is_refused_with_the_reason(tmp_path, capsys, monkeypatch):
    """As that of a network with a layer that cannot be masked."""
    monkeypatch.setattr("deploy.graphs.common.follow", lambda area, parts: None)
    cfg = toy_cfg("RetinaNet")
    path = save_checkpoint(conditioned(cfg), cfg, tmp_path / "student.pth")
    assert main([str(path)]) == 4
    assert "Images that fill the canvas agree" in capsys.readouterr().err
    assert main([str(path), "--filled", "--force"]) == 0
