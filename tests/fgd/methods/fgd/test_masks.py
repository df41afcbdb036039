import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.methods.fgd.masks import background_mask, boxes_in_cells, cell_weights, foreground_mask
from tests import reference


def weights(boxes, map_size=(5, 6), image_sizes=((40, 48),), dtype=torch.float64):
    boxes = [torch.tensor(b, dtype=torch.float64).reshape(-1, 4) for b in boxes]
    return cell_weights(boxes, map_size, list(image_sizes), dtype)


def test_two_boxes_by_hand():
    foreground, background = weights(
        [[[4, 4, 20, 28], [10, 0, 47, 15]], []], image_sizes=[(40, 48)] * 2
    )
    # First box: columns 0-3, rows 0-4, 20 cells. Second: columns 1-6, rows 0-2, 18 cells, one
    # column of them off the map; it is smaller, so it wins the overlap.
    expected = torch.zeros(5, 6, dtype=torch.float64)
    expected[:, :4] = 1 / 20
    expected[:3, 1:] = 1 / 18
    torch.testing.assert_close(foreground[0], expected, rtol=0, atol=1e-15)
    assert (background[0] > 0).sum() == 4
    assert background[0, 3:, 4:].unique().tolist() == [0.25]
    assert foreground[1].count_nonzero() == 0
    torch.testing.assert_close(background[1], torch.full_like(expected, 1 / 30))


@pytest.mark.parametrize(
    "box, cells, value",
    [
        ([8, 16, 16, 24], 4, 1 / 4),  # edges on the grid: the ceil is included, so 2 x 2
        ([9, 17, 15, 23], 4, 1 / 4),
        ([12, 12, 12, 12], 4, 1 / 4),  # zero size inside a cell: floor and ceil differ
        ([8, 8, 8, 8], 1, 1),  # zero size on a corner
        ([0, 0, 48, 40], 30, 1 / 42),  # the full image counts an off-map row and column
        ([40, 32, 48, 40], 1, 1 / 4),
        ([-16, -16, 4, 4], 4, 1 / 16),  # negative start: cut off, not wrapped
        ([100, 0, 120, 10], 0, 0),  # outside
        ([28, 0, 4, 10], 0, 0),  # inverted
        ([math.nan, 0, 10, 10], 0, 0),
        ([0, 0, math.inf, 10], 0, 0),
    ],
)
def test_one_box(box, cells, value):
    foreground, background = weights([[box]])
    assert foreground.count_nonzero() == cells
    assert foreground.max().item() == pytest.approx(value, abs=1e-15)
    assert background.sum().item() == pytest.approx(1 if cells < 30 else 0)


def test_padded_and_image_reference_differ_as_documented():
    # A 750x1000 image in an 800x1344 batch, level p3; the example of the authors' scaling.
    box = [[[500, 300, 700, 600]]]
    for image_size, columns, rows in (
        ((800, 1344), (62, 88), (37, 75)),
        ((750, 1000), (84, 118), (40, 80)),
    ):
        foreground, _ = weights(box, (100, 168), [image_size])
        used = foreground[0].nonzero()
        assert (used[:, 1].min(), used[:, 1].max()) == columns
        assert (used[:, 0].min(), used[:, 0].max()) == rows


edge = st.one_of(
    st.integers(-10, 70).map(float),
    st.floats(-10, 70, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
image_boxes = st.lists(st.tuples(edge, edge, edge, edge), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    boxes=st.lists(image_boxes, min_size=1, max_size=3),
    map_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    image_size=st.tuples(st.integers(8, 64), st.integers(8, 64)),
)
def test_equals_the_literal_reference(boxes, map_size, image_size):
    sizes = [image_size] * len(boxes)
    expected = reference.masks([torch.tensor(b).reshape(-1, 4) for b in boxes], map_size, sizes)
    for actual, wanted in zip(weights(boxes, map_size, sizes), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=0)


def test_many_boxes_cross_the_block_size():
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(317, 2, generator=generator) * 200
    boxes = torch.cat([start, start + torch.rand(317, 2, generator=generator) * 60], dim=1)
    foreground, _ = cell_weights([boxes, boxes[:3]], (25, 33), [(200, 264)] * 2, torch.float64)
    expected, _ = reference.masks([boxes, boxes[:3]], (25, 33), [(200, 264)] * 2)
    torch.testing.assert_close(foreground, expected, rtol=1e-12, atol=0)
    shuffled = boxes[torch.randperm(317, generator=generator)]
    again, _ = cell_weights([shuffled, boxes[:3]], (25, 33), [(200, 264)] * 2, torch.float64)
    torch.testing.assert_close(again, foreground, rtol=0, atol=0)


def test_shapes_and_dtypes_of_the_parts():
    boxes, valid = boxes_in_cells([torch.zeros(0, 4), torch.ones(2, 4)], (4, 4), [(8, 8)] * 2)
    assert boxes.shape == (2, 2, 4) and valid.tolist() == [[False, False], [True, True]]
    assert boxes[1, 0].tolist() == [0.5] * 4
    assert foreground_mask(boxes, valid, (4, 4)).dtype == torch.float32
    full = torch.ones(1, 2, 2)
    assert background_mask(full).sum() == 0
