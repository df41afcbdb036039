import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from deploy.checks.tiny import CANVAS, conditioned, scenes, tiny_cfg
from deploy.checks.verification import verify
from deploy.errors import UserError
from deploy.graphs import exportable
from deploy.graphs.reppoints import ExportableRepPoints, SampledConv, sampling_grid
from deploy.trt_lint import lint
from fgd.detectors.reppoints.head import DeformConv

from .conftest import SIZES, assert_equal_detections, detectron2_outputs, ort_outputs
from .test_verification import change


def reppoints(**changes):
    """The tiny detector with keys of MODEL.REPPOINTS changed."""
    cfg = tiny_cfg("RepPoints")
    for key, value in changes.items():
        cfg.MODEL.REPPOINTS[key] = value
    return conditioned(cfg)


@pytest.mark.parametrize("height, width", [(6, 9), (1, 1), (1, 7), (33, 2)])
@pytest.mark.parametrize("spread", [0.0, 0.7, 5.0, 1e3])
def test_sampling_is_the_deformable_convolution(height, width, spread):
    """In float64, with taps between cells, on them, at the border and far outside."""
    layer = DeformConv(5, 4).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 5, height, width, dtype=torch.float64)
    offsets = torch.randn(2, 18, height, width, dtype=torch.float64) * spread
    for shifts in (offsets, offsets.round()):
        torch.testing.assert_close(
            SampledConv(layer)(x, shifts), layer(x, shifts), atol=1e-11, rtol=0
        )


def test_positions_without_offsets_are_those_of_a_plain_convolution():
    grid = sampling_grid(torch.zeros(1, 18, 2, 4, dtype=torch.float64))
    assert grid.shape == (1, 6, 12, 2)
    # row 1, tap above it; column 2, tap to its right: the centre of cell (0, 3)
    torch.testing.assert_close(grid[0, 3, 8], torch.tensor([0.75, -0.5], dtype=torch.float64))
    layer = DeformConv(3, 2).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    sampled = SampledConv(layer)(x, torch.zeros(1, 18, 5, 6, dtype=torch.float64))
    torch.testing.assert_close(sampled, F.conv2d(x, layer.weight, padding=1))


def test_half_precision_keeps_positions_in_single():
    layer = DeformConv(16, 8)
    torch.nn.init.normal_(layer.weight, std=0.1)
    x, offsets = torch.randn(1, 16, 40, 90).half(), torch.randn(1, 18, 40, 90)
    expected = layer(x.float(), offsets)
    result = SampledConv(layer).half()(x, offsets)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("norm", ["GN", ""])
def test_module_equals_detectron2_on_a_ragged_batch(norm):
    model, images = reppoints(NORM=norm), scenes(3, seed=2)
    outputs = exportable(model)(images, torch.tensor(SIZES, dtype=torch.int32))
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, SIZES))


def test_few_candidates_and_places_are_detectron2s():
    model, images = reppoints(TOPK_CANDIDATES_TEST=30), scenes(2, seed=3)
    model.max_detections_per_image = 7
    outputs = exportable(model)(images, torch.tensor([CANVAS] * 2, dtype=torch.int32))
    assert outputs[1].shape == (2, 7, 4)
    assert_equal_detections(outputs[:4], detectron2_outputs(model, images, [CANVAS] * 2))


def test_boxes_are_clipped_before_they_suppress_each_other(monkeypatch):
    """What lies beyond the image is part of no overlap; clipping afterwards finds other boxes."""
    model, images = reppoints(), scenes(3, seed=2)
    model.box2box_transform.moment.data = torch.tensor([1.2, 1.2])
    sizes = torch.tensor(SIZES, dtype=torch.int32)
    detector, expected = exportable(model), detectron2_outputs(model, images, SIZES)
    assert_equal_detections(detector(images, sizes)[:4], expected)
    transform = detector.student.box2box_transform
    monkeypatch.setattr(
        ExportableRepPoints, "_decode", lambda _, *given: transform.apply_deltas(*given[:2])
    )
    with pytest.raises(AssertionError):
        assert_equal_detections(detector(images, sizes)[:4], expected)


def test_other_heads_are_refused():
    model = reppoints()
    model.head = torch.nn.Identity()
    with pytest.raises(UserError, match="the RepPoints head: Identity"):
        exportable(model)


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_equals_detectron2(batch, tiny):
    made, images = tiny("RepPoints"), scenes(3, seed=4)
    for start in range(0, 3, batch):
        part, sizes = images[start : start + batch], SIZES[start : start + batch]
        expected = detectron2_outputs(made.model, part, sizes)
        assert_equal_detections(ort_outputs(made.path, part, sizes), expected)
    assert (made.spec.architecture, made.spec.score_threshold) == ("RepPoints", 0.05)


def test_onnx_has_standard_operators_that_tensorrt_takes(tiny):
    """All that its lint finds is what --target tensorrt replaces."""
    model = onnx.load(tiny("RepPoints").path)
    kinds = {node.op_type for node in model.graph.node}
    assert "GridSample" in kinds and "DeformConv" not in kinds
    assert {node.domain for node in model.graph.node} == {""}
    replaced = ("NonMaxSuppression", "GridSample", "Mod")
    assert all(any(kind in str(found) for kind in replaced) for found in lint(model))


def test_onnx_nan_image_gives_no_detection_and_leaves_its_neighbour_alone(tiny):
    images = torch.stack([torch.full((3, *CANVAS), float("nan")), scenes(1)[0]])
    outputs = ort_outputs(tiny("RepPoints").path, images, [CANVAS] * 2)
    assert outputs[0][0] == 0 and outputs[0][1] > 5 and (outputs[3][0] == -1).all()


def x_and_y_swapped(model):
    for name in ("weight", "bias"):
        change(
            model,
            f"student.head.init_points.{name}",
            lambda w: w.reshape(9, 2, *w.shape[1:])[:, ::-1].reshape(w.shape),
        )


def half_a_stride_off(model):
    for i, stride in enumerate((8, 16, 32)):
        name = f"student.anchor_generator.cell_anchors.{i}"
        change(model, name, lambda cell, s=stride: cell + np.float32(s / 2))


def another_moment(model):
    change(model, "student.box2box_transform.exp_moment", lambda x: x * np.float32(1.05))


@pytest.mark.parametrize("fault", [x_and_y_swapped, half_a_stride_off, another_moment])
def test_planted_faults_fail(fault, tiny, tmp_path):
    made = tiny("RepPoints")
    model = onnx.load(made.path)
    fault(model)
    onnx.save(model, tmp_path / "faulty.onnx")
    report = verify(made.model, tmp_path / "faulty.onnx", made.spec)
    assert report.verdict == "the graph differs" and report.tally.unmatched > 0
