"""The cut runs, gives the heads' values, and holds nothing of what comes after them."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from deploy.errors import UserError
from deploy.speed.subgraph import network_only

from .fake_graph import write_fake_graph


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "m.onnx")
    return onnx.load(tmp_path / "m.onnx")


def test_cut_ends_at_the_last_layer_with_weights(model):
    before = model.SerializeToString()
    cut = network_only(model)
    assert [node.op_type for node in cut.graph.node] == ["Cast", "Conv"]
    assert [value.name for value in cut.graph.output] == ["features"]
    assert [value.name for value in cut.graph.initializer] == ["identity"]
    assert model.SerializeToString() == before


def test_cut_runs_and_gives_the_same_values(model):
    session = ort.InferenceSession(
        network_only(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 64, 96)).astype(np.float32)
    (features,) = session.run(None, {"images": images, "image_sizes": np.ones((2, 2), np.int32)})
    np.testing.assert_array_equal(features, images)


def test_graphs_without_a_network_are_refused(model):
    (conv,) = [node for node in model.graph.node if node.op_type == "Conv"]
    conv.op_type = "Add"
    with pytest.raises(UserError, match="no layer with weights"):
        network_only(model)
