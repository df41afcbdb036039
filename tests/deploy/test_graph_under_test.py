import re

import numpy as np
import onnx
import pytest

from deploy.checks.graph_under_test import (
    GraphUnderTest,
    broken_by_nan,
    broken_promises,
    detections,
)
from deploy.checks.verify_images import Batch
from deploy.errors import UserError

from .conftest import scenes
from .test_spec import _spec

SIZES = np.array([[96, 128]], np.int32)


@pytest.fixture(scope="module")
def graph(exported):
    path = exported("RetinaNet").path
    return GraphUnderTest(onnx.load(path), str(path))


def test_threshold_is_changed_in_a_copy(graph):
    batch = Batch(scenes(1).numpy(), SIZES)
    strict, nothing = graph.with_threshold(0.9), graph.with_threshold(2.0)
    assert (graph.threshold, strict.threshold) == (pytest.approx(0.05), pytest.approx(0.9))
    many, few = (detections(g.run(batch)[0], 0).scores for g in (graph, strict))
    np.testing.assert_array_equal(few, many[many > 0.9])
    assert 0 < len(few) < len(many)
    outputs, raw = nothing.run(batch)
    assert outputs["num_dets"].tolist() == [[0]] and outputs["boxes"].shape == (1, 100, 4)
    assert broken_promises(outputs, batch, _spec()) == []
    assert raw["raw.logits.p3"].shape == (1, 9, 12, 16)  # 3 anchors x 3 classes


def test_nan_gives_nothing_and_is_marked(graph):
    batch = Batch(scenes(1).numpy(), SIZES)
    assert broken_by_nan(graph, batch) == []
    assert graph.run(batch)[0]["num_dets"].min() > 0  # there was something to lose


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("num_dets", np.array([[1], [2]]), "gives 1 detections"),
        ("scores", np.array([[0.0, 0.0], [0.9, 0.8]]), "not marked"),
        ("boxes", np.full((2, 2, 4), 5.0), "changes what is found in others"),
    ],
)
def test_graphs_that_hide_or_spread_nan_are_named(name, rows, message):
    """A graph that does all right but one thing."""

    class Stub:
        carries_nan = True

        def run(self, batch):
            bad = np.isnan(batch.images).any(axis=(1, 2, 3))
            outputs = {
                "num_dets": np.where(bad, 0, 2)[:, None],
                "boxes": np.zeros((2, 2, 4)),
                "scores": np.where(bad[:, None], np.nan, [[0.9, 0.8]] * 2),
            }
            return outputs | ({name: rows} if bad.any() else {}), {}

    batch = Batch(np.zeros((2, 3, 8, 8), np.float32), np.full((2, 2), 8))
    (line,) = broken_by_nan(Stub(), batch)
    assert message in line


def test_what_is_no_graph_is_refused():
    with pytest.raises(UserError, match=r"x\.onnx"):
        GraphUnderTest(onnx.ModelProto(), "x.onnx")


def outputs(**changes):
    """Two detections of an image of 96 x 128, then an empty row."""
    values = {
        "num_dets": np.array([[2]], np.int32),
        "boxes": np.array([[[0, 0, 128, 96], [5, 5, 9, 9], [0] * 4]], np.float32),
        "scores": np.array([[0.9, 0.5, 0]], np.float32),
        "labels": np.array([[2, 0, -1]], np.int32),
    }
    return {**values, **{name: np.array(v, values[name].dtype) for name, v in changes.items()}}


def broken(values):
    batch = Batch(np.zeros((1, 3, 96, 128), np.float32), SIZES)
    return broken_promises(values, batch, _spec(max_detections=3))


def test_kept_promises():
    assert broken(outputs()) == []
    nothing = {"boxes": [[[0] * 4] * 3], "scores": [[0] * 3], "labels": [[-1] * 3]}
    assert broken(outputs(num_dets=[[0]], **nothing)) == []


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"labels": [[2, 0, 0]]}, "rows past num_dets"),
        ({"num_dets": [[1]]}, "rows past num_dets"),
        ({"scores": [[0.5, 0.9, 0]]}, "not descending"),
        ({"scores": [[1.5, 0.9, 0]]}, "outside 0..1"),
        ({"scores": [[0.9, np.nan, 0]]}, "NaN"),
        ({"labels": [[2, 3, -1]]}, "without class"),
        ({"boxes": [[[0, 0, 129, 96], [5, 5, 9, 9], [0] * 4]]}, "outside the image"),
        ({"boxes": [[[0, 0, 128, 96], [5, 5, 5, 9], [0] * 4]]}, "empty box"),
        ({"scores": [[0.9, 0.5]]}, r"scores is float32 \(1, 2\), not float32 \(1, 3\)"),
    ],
)
def test_broken_promises_are_named(changes, message):
    assert re.search(message, broken(outputs(**changes))[0])


def test_a_wrong_type_is_named():
    values = outputs()
    values["labels"] = values["labels"].astype(np.int64)
    assert "labels is int64" in broken(values)[0]
