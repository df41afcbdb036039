import numpy as np
import onnxruntime as ort
import pytest
import torch
import torchvision
from torch.export import Dim

from deploy.graphs.ops import INVALID, TRANSLATIONS, pyramid_roi_align, select_nms

NAN = float("nan")


def boxes_at(*lefts):
    """Boxes 10 x 10 at these x: IoU of neighbours 1 apart is 9/11, 5 apart 1/3."""
    return torch.tensor([[[x, 0.0, x + 10.0, 10.0] for x in lefts]])


def select(boxes, scores, groups=None, iou=0.5, num_groups=2, k=4):
    groups = [0] * len(scores) if groups is None else groups
    return select_nms(
        boxes, torch.tensor([scores]), torch.tensor([groups]), iou, num_groups, k
    ).tolist()[0]


def test_nms_keeps_the_best_in_score_order_and_pads():
    assert select(boxes_at(0, 1, 5, 40), [0.6, 0.9, 0.5, 0.95]) == [3, 1, 2, -1]
    assert select(boxes_at(0, 1, 5, 40), [0.6, 0.9, 0.5, 0.95], k=2) == [3, 1]
    assert select(boxes_at(0, 1, 5, 40), [0.6, 0.9, 0.5, 0.95], iou=0.3) == [3, 1, -1, -1]


def test_nms_compares_inside_a_group_only():
    assert select(boxes_at(0, 1), [0.6, 0.9], groups=[0, 1]) == [1, 0, -1, -1]


def test_nms_never_selects_invalid_or_nan_rows():
    assert select(boxes_at(0, 20, 40), [INVALID, 0.2, NAN]) == [1, -1, -1, -1]
    assert select(boxes_at(0, 20), [INVALID, INVALID]) == [-1] * 4


def test_roi_align_takes_each_box_from_its_level():
    features = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)]
    rois, level = torch.rand(2, 4, 4).cumsum(-1) * 12, torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    pooled = pyramid_roi_align(features, rois, level, [0.25, 0.125], 7, 0, True)
    assert pooled.shape == (8, 3, 7, 7)
    for row, (image, box) in enumerate((i, b) for i in range(2) for b in range(4)):
        i = level[image, box]
        expected = torchvision.ops.roi_align(
            features[i][image : image + 1], [rois[image, box][None]], 7, 0.25 / 2**i, 0, True
        )
        torch.testing.assert_close(pooled[row], expected[0])


class Both(torch.nn.Module):
    def forward(self, boxes, scores, groups, fine, coarse, rois, level):
        index = select_nms(boxes, scores, groups, 0.4, 3, 12)
        one = pyramid_roi_align([fine, coarse], rois, level, [0.25, 0.125], 5, 0, True)
        other = pyramid_roi_align([fine, coarse], rois, level, [0.25, 0.125], 5, 2, False)
        return index, one, other


def inputs(batch, seed=0, rows=10):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    corners, rois = random(batch, rows, 2) * 20, random(batch, 6, 2) * 40
    return (
        torch.cat([corners, corners + 5 + 20 * random(batch, rows, 2)], -1),
        random(batch, rows),
        torch.randint(0, 3, (batch, rows), generator=generator),
        random(batch, 4, 16, 16),
        random(batch, 4, 8, 8),
        torch.cat([rois, rois + 20 * random(batch, 6, 2)], -1),
        torch.randint(0, 2, (batch, 6), generator=generator),
    )


@pytest.fixture(scope="module")
def run():
    batch = Dim("batch", min=1)
    program = torch.onnx.export(
        Both().eval(),
        inputs(2),
        dynamo=True,
        opset_version=18,
        dynamic_shapes=[{0: batch}] * 7,
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, map(np.asarray, arrays), strict=True)))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_onnx_equals_the_eager_kernels(run, batch):
    """With 10 rows for 12 places, so that padding is needed."""
    arrays = inputs(batch, seed=batch)
    expected = Both()(*arrays)
    index, *pooled = run(arrays)
    np.testing.assert_array_equal(index, expected[0])
    assert (index >= 0).sum() >= 3 * batch and (index[:, -2:] == -1).all()
    for actual, wanted in zip(pooled, expected[1:], strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_onnx_without_valid_rows_and_with_an_empty_level(run):
    boxes, scores, groups, fine, coarse, rois, level = inputs(2)
    scores[0], scores[1] = INVALID, NAN
    arrays = (boxes, scores, groups, fine, coarse, rois, torch.ones_like(level))
    index, pooled, _ = run(arrays)
    assert (index == -1).all() and index.shape == (2, 12)
    np.testing.assert_allclose(pooled, Both()(*arrays)[1], atol=1e-5)
