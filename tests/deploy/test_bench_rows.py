"""Names of rows, calls by IO binding, and what becomes of a contender that cannot run."""

from pathlib import Path

import numpy as np
import pytest

from deploy.errors import UserError
from deploy.runtime import OrtDetector
from deploy.speed.bench_rows import GRAPH, Contender, binding_call, bound_call, short_names
from deploy.speed.footprint import measure_alone

from .fake_graph import fake_spec, write_fake_graph


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/a/x.onnx"], ["x.onnx"]),
        (["/a/x.onnx", "/a/y.onnx"], ["x.onnx", "y.onnx"]),
        (["/a/b/x.onnx", "/a/c/x.onnx"], ["b/x.onnx", "c/x.onnx"]),
        (["/b/c/x.onnx", "/d/c/x.onnx", "/y.onnx"], ["b/c/x.onnx", "d/c/x.onnx", "//y.onnx"]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_a_file_given_twice_is_refused():
    with pytest.raises(UserError, match="twice"):
        short_names([Path("/a/x.onnx"), Path("/a/b/../x.onnx")])


def test_io_binding_gives_what_an_ordinary_run_gives(tmp_path):
    """On the CPU: the same calls, with buffers of the other device."""
    write_fake_graph(tmp_path / "m.onnx")
    session = OrtDetector(tmp_path / "m.onnx").session
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 64, 96)).astype(np.float32)
    feed = {"images": images, "image_sizes": np.array([[64, 96], [50, 70]], np.int32)}
    expected, call = bound_call(session, feed)(), binding_call(session, feed, "cpu")
    assert list(expected) == ["num_dets", "boxes", "scores", "labels"]
    for _ in range(2):
        found = call()
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
        images[:] = images[::-1].copy()  # buffers take what the arrays hold at the call
        expected = bound_call(session, feed)()


def test_a_contender_that_cannot_run_is_an_error_with_its_reason(tmp_path):
    contender = Contender("gone", GRAPH, tmp_path / "gone.onnx", fake_spec())
    footprint = measure_alone(contender, "cpu", 1, [np.zeros((64, 96, 3), np.uint8)])
    assert list(footprint) == ["error"] and "gone.onnx" in footprint["error"]
