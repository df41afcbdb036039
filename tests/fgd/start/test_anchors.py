"""Anchors: k-means finds planted shapes, recall is right by hand, defaults stay if as good."""

import numpy as np
import pytest
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, pairwise_iou
from torch import tensor, zeros

from fgd.start.anchors import choose, default_sizes, kmeans, level_sizes, recall, shape_iou

PLANTED = np.array([[10.0, 10], [40, 20], [20, 40], [90, 90]])


def scattered(count=50):
    """Shapes within 5 % of the planted ones, and the planted one of each."""
    generator = np.random.default_rng(1)
    owner = generator.integers(0, 4, count)
    return PLANTED[owner] * generator.uniform(0.95, 1.05, (count, 2)), owner


def test_kmeans_finds_planted_shapes_and_is_the_same_every_time():
    shapes, owner = scattered()
    found = kmeans(shapes, 4)
    means = np.stack([shapes[owner == k].mean(0) for k in range(4)])
    np.testing.assert_allclose(found, means[np.argsort(means.prod(1))], rtol=1e-12)
    np.testing.assert_array_equal(found, kmeans(shapes, 4))


def test_overlap_of_shapes_by_hand():
    found = shape_iou(np.array([[10.0, 10]]), np.array([[10.0, 10], [20, 5], [20, 20]]))
    np.testing.assert_allclose(found, [[1, 50 / 150, 0.25]])


@pytest.mark.parametrize("shift, found", [(0, 1.0), (4, 0.0), (2, 1.0)])
def test_recall_by_hand(shift, found):
    """A box of 20x20 px, whose centre is so far from the grid of stride 8 in both directions:
    inside 16², over 2 · 400 - 256: 0.47; of 2 px 18² over 476: 0.68."""
    box = np.array([[16.0 + shift - 10, 16 + shift - 10, 20, 20]])
    assert recall(box, [[20]], [8], [1.0]) == found


def test_recall_is_that_of_detectron2s_anchors():
    generator = np.random.default_rng(0)
    boxes = np.concatenate(
        [generator.uniform(20, 60, (40, 2)), generator.uniform(8, 60, (40, 2))], 1
    )
    sizes, strides, ratios = [[12, 20], [30, 50]], [8, 16], [0.5, 1.0]
    made = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[ratios], strides=strides, offset=0.0)
    assert made.num_anchors == [4, 4]
    grids = [zeros(1, 1, 20, 20), zeros(1, 1, 10, 10)]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    iou = pairwise_iou(Boxes(tensor(corners).float()), Boxes.cat(made(grids)))
    assert recall(boxes, sizes, strides, ratios) == (iou.max(1).values >= 0.5).float().mean()


def test_levels_share_the_clusters_by_area():
    shapes = np.repeat([[s, s] for s in (10.0, 20, 30, 40, 50, 60)], 3, axis=0)
    assert level_sizes(shapes, 3, 2) == [[10, 20], [30, 40], [50, 60]]


@pytest.mark.parametrize(
    "shapes, sizes", [([(30, 30)], [[30], [30], [30]]), ([(9, 9), (36, 36)], [[9], [22.5], [36]])]
)
def test_fewer_shapes_than_anchors(shapes, sizes):
    assert level_sizes(np.array(shapes, float), 3, 3) == sizes


def test_small_boxes_get_anchors_of_their_own():
    """Of 12 px, on the grid of stride 8: Detectron2's smallest has 32."""
    boxes = np.array([[8.0 * i - 6, 8 * i - 6, 12, 12] for i in range(1, 9)])
    found = choose(boxes, [8, 16, 32], two_stage=False)
    assert (found.found, found.default, found.kept) == (1.0, 0.0, False)
    assert found.sizes == [[12], [12], [12]] and found.ratios == [1.0]


def test_defaults_stay_where_they_are_as_good():
    boxes = np.array([[16.0, 16, 32, 32], [32, 32, 64, 64], [0, 64, 128, 128]])
    found = choose(boxes, [4, 8, 16], two_stage=True)
    assert found.kept and found.default == 1.0
    assert found.sizes == [[32], [64], [128]] == default_sizes([4, 8, 16], True)
    assert found.ratios == [0.5, 1.0, 2.0]


def test_long_boxes_get_a_ratio():
    generator = np.random.default_rng(0)
    boxes = np.zeros((40, 4))
    boxes[:, :2] = generator.integers(0, 8, (40, 2)) * 8.0 - [32, 5]
    boxes[:, 2:] = [64, 10]
    found = choose(boxes, [8, 16, 32], two_stage=False)
    assert found.ratios == [0.16] and found.found > 0.9 > found.default
