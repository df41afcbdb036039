import numpy as np
import pytest
import torch

from deploy.checks.oracle import RawJudge, detectron2_detections, score_threshold
from deploy.checks.verify_images import Batch
from deploy.graphs import exportable, rcnn
from deploy.graphs.convert import RAW

from .conftest import conditioned, scenes, toy_cfg


@pytest.fixture(scope="module")
def model():
    return conditioned(toy_cfg("GeneralizedRCNN"))


def test_threshold_is_set_and_put_back(model):
    path = "roi_heads.box_predictor.test_score_thresh"
    with pytest.raises(RuntimeError), score_threshold(model, path, 0.7):
        assert model.roi_heads.box_predictor.test_score_thresh == 0.7
        raise RuntimeError
    assert model.roi_heads.box_predictor.test_score_thresh == 0.05


def test_detectron2_sees_each_image_alone(model):
    """Neither the canvas' padding nor its size, nor the other image, which would move boxes."""
    images, sizes = scenes(2).numpy(), np.array([[64, 64], [96, 128]], np.int32)
    small, large = detectron2_detections(model, Batch(images, sizes))
    with torch.no_grad():
        alone = {"image": torch.from_numpy(images[0, :, :64, :64].copy())}
        expected = model([alone])
        together = model([alone, {"image": torch.from_numpy(images[1])}])
    boxes, padded = (x[0]["instances"].pred_boxes.tensor.numpy() for x in (expected, together))
    np.testing.assert_array_equal(small.boxes, boxes)
    assert len(small.scores) > 5 and not np.array_equal(padded, boxes)
    assert len(large.scores) > 5


def test_raw_errors_are_measured_against_float64_on_the_graphs_own_boxes(model):
    batch = Batch(scenes(2).numpy(), np.array([[96, 128], [80, 100]], np.int32))
    with torch.no_grad():
        raw = exportable(model).network(*map(torch.from_numpy, batch))
    raw = {RAW + name: value.numpy() for name, value in raw.items()}
    raw[RAW + "rois"] = raw[RAW + "rois"][:, ::-1].copy()  # another choice of boxes
    count = len(raw[RAW + "rois"][0])
    for name in (RAW + "class_logits", RAW + "box_deltas"):
        rows = raw[name].reshape(2, count, -1)[:, ::-1]
        raw[name] = rows.reshape(2 * count, -1).copy()
    raw[RAW + "class_logits"][3, 1] += 0.25
    errors = RawJudge(model).errors(batch, raw)
    assert "rois" not in errors and errors["class_logits"]["graph"] == pytest.approx(0.25, abs=1e-3)
    for name, error in errors.items():
        assert 0 < error["torch"] < 1e-5 * max(error["scale"], 1), name
        assert name == "class_logits" or error["graph"] < 1e-4, name


def test_cut_images_reads_arrays(model, monkeypatch):
    monkeypatch.setattr(rcnn, "MAX_CANDIDATES", 3)
    raw = {
        RAW + "rois": np.array([[[0, 0, 9, 9]] * 2], np.float32),
        RAW + "class_logits": np.zeros((2, 4), np.float32),  # two proposals, 3 classes at 0.25
    }
    assert RawJudge(model).cut_images(raw, np.array([[1]], np.int32)) == 1
    assert RawJudge(model).cut_images(raw, np.array([[100]], np.int32)) == 0
