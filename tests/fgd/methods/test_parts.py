"""What DeFeat and TADF share: where boxes are, and rows of logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.boxes import (
    cells_of_boxes,
    half_mean_square,
    level_of_boxes,
    object_mask,
    pyramid,
    stack_boxes,
)
from fgd.methods.parts import adapt_conv, divergence, mean_over


def mask_of(boxes, stride, size):
    cells = cells_of_boxes(*stack_boxes(boxes), stride, size)
    return object_mask(cells, size, torch.float64)


def reference_cells(box, stride, size):
    """[(x, y)] that one box marks, by the rule in words."""
    (height, width), (x1, y1, x2, y2) = size, box
    if not all(map(math.isfinite, box)) or x2 < x1 or y2 < y1:
        return []
    left, top = (max(0, math.trunc(x / stride)) for x in (x1, y1))
    right = min(width, math.trunc(x2 / stride))
    bottom = min(height, math.trunc(y2 / stride))
    if right < left or bottom < top:
        return []
    if left == right or top == bottom:
        return [(min(left, width - 1), min(top, height - 1))]
    return [(x, y) for x in range(left, right) for y in range(top, bottom)]


# Inverted, zero-size and outside boxes come by themselves.
coordinate = st.floats(-20, 84, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 64.0])


@settings(max_examples=60, deadline=None)
@given(
    boxes=st.lists(st.lists(st.tuples(*[coordinate] * 4), max_size=4), min_size=1, max_size=3),
    stride=st.sampled_from([4, 8, 6]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_cells_equal_the_literal_reference(boxes, stride, size):
    found = mask_of([torch.tensor(b).reshape(-1, 4) for b in boxes], stride, size)
    wanted = torch.zeros(len(boxes), *size, dtype=torch.float64)
    for n, own in enumerate(boxes):
        for box in torch.tensor(own).reshape(-1, 4).double().tolist():
            for x, y in reference_cells(box, stride, size):
                wanted[n, y, x] = 1
    assert torch.equal(found, wanted)


def test_cells_by_hand():
    def cells(*box):
        return mask_of([torch.tensor([box])], 8, (4, 5))[0].nonzero().flip(1).tolist()

    assert cells(7.9, 8, 24, 17) == [[0, 1], [1, 1], [2, 1]]  # (0, 1) to before (3, 2)
    assert cells(9.0, 1, 15, 31) == [[1, 0]]  # thin: one cell, no column
    assert cells(40.0, 3, 40, 20) == cells(41.0, 3, 60, 20) == [[4, 0]]  # at the right border
    assert cells(33.0, 32, 39, 32) == [[4, 3]]  # and on the lower one
    assert cells(-7.9, -30, 9, 9) == [[0, 0]]
    assert cells(50.0, 0, 60, 20) == cells(-20.0, 0, -9, 20) == []
    assert cells(20.0, 8, 10, 17) == cells(11.0, 8, 10, 17) == []  # inverted, also in one cell


@pytest.mark.parametrize(
    ("side", "level"),
    [(0.0, 0), (55, 0), (100, 0), (111, 1), (223, 2), (400, 2), (447, 3), (9999, 3)],
)
def test_levels_by_hand(side, level):
    """100: log2(101 / 56) is 0.85. 111 is the first whose 112 is twice 56."""
    boxes = torch.tensor([[[10.0, 20, 10 + side, 20 + side]]], dtype=torch.float64)
    assert level_of_boxes(boxes, 4).item() == level
    assert level_of_boxes(boxes, 1).item() == 0


def test_boxes_that_are_none_have_some_level():
    boxes = torch.tensor([[[math.nan] * 4, [9.0, 9, 3, 3], [0, 0, math.inf, math.inf]]])
    assert level_of_boxes(boxes, 3).tolist() == [[0, 0, 2]]


def test_no_boxes():
    boxes, valid = stack_boxes([torch.zeros(0, 4), torch.ones(2, 4)])
    assert valid.tolist() == [[False, False], [True, True]] and boxes.dtype == torch.float64
    assert mask_of([torch.zeros(0, 4)] * 2, 8, (2, 3)).sum() == 0


def test_pyramids_are_sorted_and_need_strides():
    p3, p4 = Level("p3", 1, 1, "p3", 8), Level("p4", 1, 1, "p4", 16)
    stage = Level("res4", 1, 1, "res4", 0, stage=True)
    assert pyramid([p4, stage, p3]) == [p3, p4]
    with pytest.raises(UserError, match="'p5' states no stride"):
        pyramid([p3, Level("p5", 1, 1, "p5")])


def test_adapters_begin_near_zero():
    weight = adapt_conv(64, 32).weight
    assert weight.shape == (32, 64, 3, 3)
    assert 0.8e-4 < weight.std() < 1e-4 and weight.abs().max() <= 2e-4


def test_half_of_the_mean_square():
    error, mask = torch.full((2, 3, 4), 7.0), torch.zeros(2, 3, 4)
    assert half_mean_square(error, mask, 5) == 0
    mask[0, :2] = 1  # 8 cells of 5 channels with sum 7
    assert half_mean_square(error, mask, 5).item() == pytest.approx(7 / 10)
    assert half_mean_square(error, mask * 0.01, 5).item() == pytest.approx(0.08 * 7)  # below 1


def test_divergence_and_means_over_rows():
    student = torch.tensor([[0.0, 0], [1, 3]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[math.log(3), 0], [3, 5]], dtype=torch.float64)
    found = divergence(student, teacher)
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.tolist() == pytest.approx([wanted, 0], abs=1e-15)
    scaled = divergence(3 * student, 3 * teacher, 3.0)
    assert scaled.tolist() == pytest.approx([9 * wanted, 0], abs=1e-14)
    rows = torch.tensor([True, False])
    assert mean_over(found, rows).item() == pytest.approx(wanted)
    nothing = mean_over(found, rows & False)
    assert nothing == 0 and torch.autograd.grad(nothing, student)[0].abs().sum() == 0
