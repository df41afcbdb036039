import math

import pytest
import torch

from fgd.detectors.reppoints.points import (
    MomentTransform,
    at_least_float32,
    moment_boxes,
    scale_gradient,
)


def grid_points(x, y, half_width, half_height):
    """The 18 channels of a regular 3x3 grid that spans a box."""
    steps = torch.tensor([-1.0, 0, 1], dtype=torch.float64)
    ys, xs = torch.meshgrid(y + half_height * steps, x + half_width * steps, indexing="ij")
    return torch.stack((ys.flatten(), xs.flatten()), dim=1).flatten()


def test_a_symmetric_grid_is_a_box_around_its_middle():
    """The deviation of -1, 0, 1 three times each, divided by 8, is the root of 6 / 8."""
    points = grid_points(x=2.0, y=-1.0, half_width=3.0, half_height=0.5)
    part = math.sqrt(0.75)
    box = moment_boxes(points, torch.ones(2))
    expected = [2 - 3 * part, -1 - 0.5 * part, 2 + 3 * part, -1 + 0.5 * part]
    torch.testing.assert_close(box, torch.tensor(expected, dtype=torch.float64))
    exact = moment_boxes(points, torch.full((2,), 1 / part, dtype=torch.float64))
    torch.testing.assert_close(exact, torch.tensor([-1, -1.5, 5, -0.5], dtype=torch.float64))


def test_the_first_moment_is_of_the_width_and_the_second_of_the_height():
    points = grid_points(0.0, 0.0, 1.0, 1.0)
    transform = MomentTransform().double()
    plain = transform(points)
    transform.moment.data = torch.tensor([math.log(2), math.log(3)], dtype=torch.float64)
    stretched = transform(points)
    factors = torch.tensor([2.0, 3, 2, 3], dtype=torch.float64)
    torch.testing.assert_close(stretched, plain * factors)


def test_boxes_equal_the_definition_on_random_points():
    points = torch.randn(5, 7, 18, dtype=torch.float64)
    factors = torch.tensor([0.3, -0.2], dtype=torch.float64).exp()
    ys, xs = points[..., 0::2], points[..., 1::2]
    width, height = xs.std(-1) * math.exp(0.3), ys.std(-1) * math.exp(-0.2)
    x, y = xs.mean(-1), ys.mean(-1)
    expected = torch.stack((x - width, y - height, x + width, y + height), dim=-1)
    torch.testing.assert_close(moment_boxes(points, factors), expected)


def test_equal_points_are_an_empty_box_and_their_gradient_is_finite():
    points = torch.full((2, 18), 1.5, requires_grad=True)
    box = moment_boxes(points, torch.ones(2))
    assert torch.equal(box, torch.full((2, 4), 1.5))
    box[:, 0].sum().backward()
    assert torch.equal(points.grad[:, 0::2], torch.zeros(2, 9))
    torch.testing.assert_close(points.grad[:, 1::2], torch.full((2, 9), 1 / 9))


def test_gradients_are_right():
    points = torch.randn(3, 18, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moment_boxes, (points, factors))


def test_the_moments_gradient_is_a_hundredth():
    transform = MomentTransform().double()
    torch.nn.init.constant_(transform.moment, 0.4)
    points, weight = torch.randn(6, 18, dtype=torch.float64), torch.randn(6, 4).double()
    (transform(points) * weight).sum().backward()
    free = torch.full((2,), 0.4, dtype=torch.float64, requires_grad=True)
    (moment_boxes(points, free.exp()) * weight).sum().backward()
    torch.testing.assert_close(transform.moment.grad, 0.01 * free.grad)
    assert torch.equal(transform(points), moment_boxes(points, free.exp()))


def test_moving_the_anchor_by_one_stride_moves_the_box_by_one_stride():
    transform, points = MomentTransform(), torch.randn(4, 18)
    anchor = torch.tensor([-4.0, -4, 4, 4]).expand(4, 4)  # stride 8 around (0, 0)
    boxes = transform.apply_deltas(points, anchor)
    torch.testing.assert_close(boxes, 8 * transform(points))
    moved = transform.apply_deltas(points, anchor + torch.tensor([8.0, 16, 8, 16]))
    torch.testing.assert_close(moved - boxes, torch.tensor([8.0, 16, 8, 16]).expand(4, 4))


def test_no_points_are_no_boxes(recwarn):
    transform = MomentTransform()
    assert transform.apply_deltas(torch.zeros(0, 18), torch.zeros(0, 4)).shape == (0, 4)
    assert not recwarn.list


def test_scaled_gradient_leaves_values_alone():
    x = torch.tensor([1e-20, 3.0, -1e20], requires_grad=True)
    y = scale_gradient(x, 0.1)
    assert torch.equal(y, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 0.1))
    constant = torch.ones(2)
    assert scale_gradient(constant, 0.1) is constant  # nothing for an exported graph to compute


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_alone_is_raised(kind):
    raised = at_least_float32(torch.ones(1, dtype=kind)).dtype
    assert raised == (kind if kind == torch.float64 else torch.float32)
