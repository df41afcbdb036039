import numpy as np
import pytest
import torch

from deploy.checks.oracle import RawJudge, detectron2_detections, score_threshold
from deploy.checks.verify_images import Batch
from deploy.graphs import exportable, rcnn
from deploy.graphs.convert import RAW
from tests.deploy.conftest import conditioned, scenes, toy_cfg


@pytest.fixture(scope="module")
def model():
    return conditioned(toy_cfg("GeneralizedRCNN"))


def test_threshold_is_set_and_put_back(model):
    path = "roi_heads.box_predictor.test_score_thresh"
    with pytest.raises(RuntimeError), score_threshold(model, path, 0.7):
        assert model.roi_heads.box_predictor.test_score_thresh == 0.7
        raise RuntimeError
    assert model.roi_heads.box_predictor.test_score_thresh == 0.05


def test_detectron2_sees_the_canvas_and_not_the_padding(model):
    """A small image alone, on its own canvas and on a larger one: padding moves its boxes."""
    image, noise = scenes(1, (64, 64))[0].numpy(), np.full((1, 3, 96, 128), 77, np.float32)
    noise[0, :, :64, :64] = image
    size = np.array([[64, 64]], np.int32)
    (large,) = detectron2_detections(model, Batch(noise, size))
    noise[0, :, 64:], noise[0, :, :, 64:] = 200, 200
    (again,) = detectron2_detections(model, Batch(noise, size))
    np.testing.assert_array_equal(large.boxes, again.boxes)
    padded = torch.zeros(3, 96, 128)
    with torch.no_grad():
        expected = model([{"image": torch.from_numpy(image)}, {"image": padded}])[0]["instances"]
    np.testing.assert_array_equal(large.boxes, expected.pred_boxes.tensor.numpy())
    (own,) = detectron2_detections(model, Batch(image[None], size))
    assert len(own.scores) > 5 and not np.array_equal(own.boxes, large.boxes)


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
