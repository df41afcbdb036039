import pytest
import torch
from detectron2.layers import DeformConv
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import nn

from deploy.errors import UserError
from deploy.graphs import exportable
from deploy.graphs.common import anchors_at, clip, decode, dense, finish, nonempty, require

from .conftest import (
    ARCHITECTURES,
    CANVAS,
    SIZES,
    assert_equal_detections,
    detectron2_outputs,
    ort_outputs,
    scenes,
    toy_cfg,
)

NAN = float("nan")


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (40, 7)])
def test_computed_anchors_are_detectron2s_to_the_bit(offset, grid):
    generator = DefaultAnchorGenerator(
        sizes=[[30, 47.6]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[16], offset=offset
    )
    expected = generator([torch.zeros(1, 1, *grid)])[0].tensor
    index = torch.arange(len(expected))[None]
    (cell_anchors,) = generator.cell_anchors
    anchors = anchors_at(index, grid[1], cell_anchors, 16, offset)
    assert torch.equal(anchors[0], expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_decode_is_detectron2s(weights):
    transform = Box2BoxTransform(weights)
    boxes = torch.rand(20, 4).cumsum(-1) * 50
    deltas = torch.randn(20, 4) * 3
    deltas[0, 2:] = 100  # clamped
    torch.testing.assert_close(
        decode(deltas, boxes, transform),
        transform.apply_deltas(deltas, boxes),
        rtol=1e-6,
        atol=1e-4,
    )


def test_dense_orders_rows_columns_anchors():
    x = torch.arange(2 * 6 * 2 * 2).reshape(1 * 2, 6, 2, 2)
    rows = dense(x, 3)
    assert rows.shape == (2, 8, 3)
    assert rows[1, 1].tolist() == x[1, 3:6, 0, 0].tolist()  # second anchor of the first cell
    assert rows[0, 2].tolist() == x[0, 0:3, 0, 1].tolist()  # first anchor of the next column


def test_clip_and_nonempty():
    boxes = torch.tensor([[[-3.0, -1, 50, 5], [30, 2, 40, 4], [0, 0, 1, NAN], [0, 5, 9, 5]]])
    clipped = clip(boxes, torch.tensor([[10, 20]]))
    assert clipped[0, 0].tolist() == [0, 0, 20, 5] and clipped[0, 1].tolist() == [20, 2, 20, 4]
    assert nonempty(clipped).tolist() == [[True, False, False, False]]
    assert nonempty(clipped, threshold=5.0).tolist() == [[False] * 4]


def test_finish_clips_drops_empty_boxes_and_closes_the_gap():
    boxes = torch.tensor([[[0.0, 0, 5, 5], [30, 0, 40, 5], [2, 2, 30, 8], [0, 0, 1, 1]]])
    scores, labels = torch.tensor([[0.2, 0.9, 0.5, 0.7]]), torch.tensor([[4, 5, 6, 7]])
    index, sizes = torch.tensor([[1, 2, 0, -1]]), torch.tensor([[10, 20]], dtype=torch.int32)
    count, boxes, scores, labels = finish(index, boxes, scores, labels, sizes)
    assert count.tolist() == [[2]] and count.dtype == torch.int32
    assert boxes.tolist() == [[[2, 2, 20, 8], [0, 0, 5, 5], [0] * 4, [0] * 4]]
    assert scores.tolist() == [[0.5, pytest.approx(0.2), 0, 0]]
    assert labels.tolist() == [[6, 4, -1, -1]] and labels.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_normalize_is_exactly_zero_outside_the_true_size(dtype, toy_detector):
    images = torch.full((2, 3, 32, 64), 200).to(dtype)
    if dtype == torch.float32:
        images[1, :, 20:] = NAN  # the padding may hold anything
    x = toy_detector.normalize(images, torch.tensor([[32, 64], [20, 30]], dtype=torch.int32))
    mean, std = toy_detector.student.pixel_mean, toy_detector.student.pixel_std
    torch.testing.assert_close(x[1, :, :20, :30], ((200 - mean) / std).expand(3, 20, 30))
    assert (x[0] != 0).all() and not x[1, :, 20:].any() and not x[1, :, :, 30:].any()


def test_the_callers_model_is_left_alone():
    model = build_model(toy_cfg("RetinaNet")).train()
    detector = exportable(model)
    assert not any(part.training for part in detector.modules())
    assert not any(weight.requires_grad for weight in detector.parameters())
    assert all(part.training for part in model.modules()) and model is not detector.student
    assert any(weight.requires_grad for weight in model.parameters())


def test_unknown_architectures_are_refused():
    with pytest.raises(UserError, match="Module cannot be exported; FCOS, GeneralizedRCNN"):
        exportable(nn.Module())


def test_require_refuses_subclasses():
    class Special(nn.Conv2d):
        pass

    require(nn.Conv2d(1, 1, 1), nn.Conv2d, "x")
    with pytest.raises(UserError, match="MODEL.X: Special cannot be exported, only Conv2d can"):
        require(Special(1, 1, 1), nn.Conv2d, "MODEL.X")


def test_backbones_with_deformable_convolution_are_refused():
    model = build_model(toy_cfg("RetinaNet"))
    model.backbone.bottom_up.stages[1] = DeformConv(16, 16, 3)
    with pytest.raises(UserError, match=r"DEFORM_ON_PER_STAGE: .*stages.1 is a DeformConv"):
        exportable(model)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_equals_detectron2(arch, batch, exported):
    """RetinaNet: p3-p7 over mobilenetv3; p7 has one cell, fewer than K candidates."""
    made, images = exported(arch), scenes(3, seed=4)
    for start in range(0, 3, batch):
        part, sizes = images[start : start + batch], SIZES[start : start + batch]
        expected = detectron2_outputs(made.model, part, sizes)
        assert_equal_detections(ort_outputs(made.path, part, sizes), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_onnx_nan_image_gives_no_detection_and_leaves_its_neighbour_alone(arch, exported):
    images = torch.stack([torch.full((3, *CANVAS), NAN), scenes(1)[0]])
    outputs = ort_outputs(exported(arch).path, images, [CANVAS] * 2)
    assert [x.shape for x in outputs] == [(2, 1), (2, 100, 4), (2, 100), (2, 100)]
    assert outputs[0][0] == 0 and outputs[0][1] > 5
    assert not outputs[1][0].any() and (outputs[3][0] == -1).all()
