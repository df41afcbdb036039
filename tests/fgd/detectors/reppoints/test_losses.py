import math

import torch

from fgd.detectors.reppoints.assign import BACKGROUND, IGNORED
from fgd.detectors.reppoints.losses import box_loss, class_loss, class_targets, normalizer


def test_every_image_counts_at_least_once():
    rows = torch.tensor([[0, 3, BACKGROUND, IGNORED], [BACKGROUND] * 4, [IGNORED, 0, 0, 0]])
    assert normalizer(rows) == 2 + 1 + 3


def test_targets_have_one_class_where_positive():
    target, counted = class_targets(
        torch.tensor([1, BACKGROUND, IGNORED, 0]), torch.tensor([2, 0]), 3
    )
    assert target.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert counted.tolist() == [True, True, False, True]
    target, counted = class_targets(torch.tensor([BACKGROUND]), torch.zeros(0).long(), 3)
    assert not target.any() and counted.all()


def test_focal_loss_by_hand():
    """Score p: -alpha (1 - p)^2 log p where true, -(1 - alpha) p^2 log(1 - p) where not."""
    p = 0.8
    logits = torch.full((3, 1), math.log(p / (1 - p)), dtype=torch.float64)
    target, counted = torch.tensor([[1.0], [0], [0]]), torch.tensor([True, True, False])
    expected = -0.25 * 0.2**2 * math.log(p) - 0.75 * p**2 * math.log(1 - p)
    loss = class_loss(logits, target, counted, 0.25, 2.0)
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)


def test_box_loss_by_hand():
    """In units of 32 px the sides differ by 0, 0.0625 (< 0.11), 0.5 and -1."""
    target = torch.tensor([[0.0, 0, 0, 0]])
    box = torch.tensor([[0.0, 2, 16, -32]])
    loss = box_loss(box, target, torch.tensor([[32.0]]), 0.11)
    expected = 0.0625**2 / 0.22 + (0.5 - 0.055) + (1 - 0.055)
    torch.testing.assert_close(loss.item(), expected)


def test_no_boxes_give_zero_and_a_gradient():
    boxes = torch.zeros(0, 4, requires_grad=True)
    loss = box_loss(boxes, torch.zeros(0, 4), torch.zeros(0, 1), 0.11)
    loss.backward()
    assert loss == 0 and boxes.grad.shape == (0, 4)
