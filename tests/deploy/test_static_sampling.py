"""Sampling by Gather equals PyTorch's, and with it a deformable convolution Detectron2's."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deploy.errors import UserError
from deploy.graphs.reppoints import sampling_grid
from deploy.graphs.tensorrt.static_ops import _grid_sample_static
from deploy.trt_lint import lint
from fgd.detectors.reppoints.head import DeformConv

from .test_static_ops import convert, session_of

MAPS, CHANNELS = [(2, 2), (1, 7), (9, 2)], 3


class Sample(torch.nn.Module):
    """A map of each size, and where it is sampled: as often as a 3x3 convolution has taps."""

    def forward(self, square, on_square, line, on_line, tall, on_tall):
        pairs = (square, on_square), (line, on_line), (tall, on_tall)
        return tuple(F.grid_sample(x, grid, align_corners=False) for x, grid in pairs)


def maps_and_offsets(batch, spread=1.0, seed=0):
    """(map, offsets of the taps in cells) per size, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch, CHANNELS, *size, generator=generator, dtype=torch.float64),
            torch.randn(batch, 18, *size, generator=generator, dtype=torch.float64) * spread,
        )
        for size in MAPS
    ]


def arguments(pairs):
    return [tensor for x, offsets in pairs for tensor in (x, sampling_grid(offsets))]


def literally(x, grid):
    """Every cell's share in every sample, one after the other."""
    batch, channels, height, width = x.shape
    result = np.zeros((batch, channels, *grid.shape[1:3]))
    for n, i, j in np.ndindex(*grid.shape[:3]):
        column, row = (grid[n, i, j] + 1) * (width, height) / 2 - 0.5
        for h, w in np.ndindex(height, width):
            share = max(0, 1 - abs(row - h)) * max(0, 1 - abs(column - w))
            result[n, :, i, j] += share * x[n, :, h, w]
    return result


@pytest.fixture(scope="module")
def model():
    return convert(Sample(), tuple(arguments(maps_and_offsets(2))))


@pytest.fixture(scope="module")
def run(model):
    session = session_of(model)
    return lambda arrays: session(arrays)[0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spread", [0.0, 0.7, 3.0, 1e3])
def test_it_is_pytorchs_and_with_a_convolution_detectron2s(run, batch, spread):
    """Between cells, far outside and, where offsets are whole, on cells, the border and beyond."""
    layer = DeformConv(CHANNELS, 4).double()
    torch.nn.init.normal_(layer.weight)
    pairs = maps_and_offsets(batch, spread)
    for chosen in (pairs, [(x, offsets.round()) for x, offsets in pairs]):
        given = arguments(chosen)
        for (x, offsets), actual, expected in zip(chosen, run(given), Sample()(*given)):
            np.testing.assert_allclose(actual, expected, atol=1e-12, rtol=0)
            convolved = F.conv2d(torch.from_numpy(actual), layer.weight, stride=3)
            torch.testing.assert_close(convolved, layer(x, offsets), atol=1e-11, rtol=0)


def test_it_is_a_literal_sum_over_cells(run):
    given = arguments(maps_and_offsets(2, seed=1))
    found = run(given)
    for x, grid, actual in zip(given[::2], given[1::2], found, strict=True):
        np.testing.assert_allclose(actual, literally(x.numpy(), grid.numpy()), atol=1e-12, rtol=0)
        assert np.abs(actual).max() > 1


# of the map ((1, 2), (3, 4)), whose cells are centred at -0.5 and 0.5
BY_HAND = {
    (-0.5, -0.5): 1,
    (0.5, 0.5): 4,
    (0, 0): 2.5,
    (0, -0.5): 1.5,
    (-1, -1): 0.25,  # the corner of the map: half outside in both directions
    (1, 0.5): 2,
    (0, -1): 0.75,
    (0.5, -1.25): 0.5,
    (-1.5, 0): 0,  # as far from the first cell as its neighbour is
    (0, 1.5): 0,
    (7, 0): 0,
    (1e30, -0.5): 0,
    (-0.5, -np.inf): 0,
}


def test_by_hand(run):
    given = arguments(maps_and_offsets(1))
    given[0][:] = torch.tensor([[1.0, 2], [3, 4]])
    places = torch.tensor([*BY_HAND], dtype=torch.float64)
    given[1].view(-1, 2)[: len(places)] = places
    square = run(given)[0].reshape(CHANNELS, -1)[:, : len(places)]
    np.testing.assert_allclose(square, [[*BY_HAND.values()]] * CHANNELS, atol=1e-12)


def test_nan_stays_where_it_is(run):
    """A position of NaN is no crash; a map of NaN is that image's alone."""
    given = arguments(maps_and_offsets(3, seed=2))
    expected = [value.copy() for value in run(given)]
    given[1][0, 0, 0, 1] = given[3][0, 0, 0, 0] = given[0][2] = float("nan")
    square, line, tall = run(given)
    expected[0][0, :, 0, 0] = square[0, :, 0, 0]
    expected[1][0, :, 0, 0] = line[0, :, 0, 0]
    for actual, wanted in ((square[:2], expected[0][:2]), (line, expected[1]), (tall, expected[2])):
        np.testing.assert_array_equal(actual, wanted)


def test_no_image_gives_no_sample(run):
    shapes = [value.shape for value in run(arguments(maps_and_offsets(0)))]
    assert shapes == [(0, CHANNELS, 3 * height, 3 * width) for height, width in MAPS]


def test_the_graph_has_what_tensorrt_takes(model):
    kinds = [node.op_type for node in model.graph.node]
    assert "GridSample" not in kinds and kinds.count("Gather") == 4 * len(MAPS)
    assert lint(model) == []


@pytest.mark.parametrize("options", [(1, 0, False), (0, 1, False), (0, 0, True)])
def test_other_kinds_of_sampling_are_refused(options):
    with pytest.raises(UserError, match="--target tensorrt: grid_sample with other options"):
        _grid_sample_static(None, None, *options)
