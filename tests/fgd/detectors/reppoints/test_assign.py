import math

import pytest
import torch

from fgd.detectors.reppoints.assign import BACKGROUND, IGNORED, assign_by_iou, assign_points

SHAPES, STRIDES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)], [8, 16, 32, 64, 128]
FIRST = [0, 320, 400, 420, 426]  # number of each level's first location
TOTAL = 428


def assigned_to(boxes, shapes=SHAPES, strides=STRIDES):
    """{location: box} of the locations that have one."""
    found = assign_points(torch.tensor(boxes), shapes, strides)
    return {int(i): int(found[i]) for i in (found != BACKGROUND).nonzero()[:, 0]}


def literal_points(boxes, shapes, strides, scale=4):
    """Section by section as the paper's implementation describes it, one location at a time."""
    first = [sum(h * w for h, w in shapes[:i]) for i in range(len(shapes))]
    lowest, owner, nearest = int(math.log2(strides[0])), {}, {}
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        w, h = max(x2 - x1, 1e-6), max(y2 - y1, 1e-6)
        level = int((math.log2(w / scale) + math.log2(h / scale)) / 2)
        level = min(max(level, lowest), lowest + len(shapes) - 1) - lowest
        best = None
        for i in range(shapes[level][0]):
            for j in range(shapes[level][1]):
                x, y = j * strides[level], i * strides[level]
                distance = math.hypot((x - (x1 + x2) / 2) / w, (y - (y1 + y2) / 2) / h)
                if best is None or distance < best[0]:
                    best = distance, first[level] + i * shapes[level][1] + j
        distance, location = best
        if location not in nearest or distance < nearest[location]:
            nearest[location], owner[location] = distance, number
    return owner


def test_one_box_of_64_takes_the_nearest_location_of_p4():
    """Its middle (70, 52) lies between the locations (64, 48) and (80, 64) of stride 16."""
    assert assigned_to([[38.0, 20, 102, 84]]) == {FIRST[1] + 3 * 10 + 4: 0}


def test_nearest_counts_in_widths_and_heights():
    """Among equal sides nearest is nearest; here 7 px across are less than 5 px down."""
    wide = [[39.0 - 64, 37.0 - 16, 39 + 64, 37 + 16]]  # 128 x 32: level of 64, stride 16
    column, row = 2, 2  # (32, 32): 7 / 128 and 5 / 32
    assert assigned_to(wide) == {FIRST[1] + row * 10 + column: 0}


@pytest.mark.parametrize("side, level", [(4, 0), (32, 0), (63.9, 0), (64, 1), (127.9, 1), (128, 2)])
def test_levels_by_size(side, level):
    (location,) = assigned_to([[0.0, 0, side, side]])
    assert FIRST[level] <= location < [*FIRST, TOTAL][level + 1]


def test_every_power_of_two_is_exactly_on_its_level():
    """Also as one of many, where vector instructions compute the logarithm."""
    strides = [2**i for i in range(1, 14)]
    sides = [4.0 * s for s in strides] * 3
    found = assign_points(
        torch.tensor([[0, 0, s, s] for s in sides]), [(9, 9)] * len(strides), strides
    )
    assert found.view(len(strides), 81).max(dim=1).values.tolist() == list(range(len(strides)))


def test_giant_tiny_and_empty_boxes_end_on_the_outer_levels():
    assert list(assigned_to([[0.0, 0, 160, 128000]])) == [FIRST[4] + 1]
    assert list(assigned_to([[17.0, 9, 17, 9]])) == [1 * 20 + 2]
    assert list(assigned_to([[17.0, 9, 17.001, 200]])) == [13 * 20 + 2]


def test_the_nearer_box_keeps_a_location_and_the_earlier_one_on_a_tie():
    near, far = [30.0, 30, 66, 66], [33.0, 33, 69, 69]  # middles (48, 48) and (51, 51)
    location = 6 * 20 + 6
    assert assigned_to([near, far]) == {location: 0}
    assert assigned_to([far, near]) == {location: 1}
    assert assigned_to([near, near]) == {location: 0}
    mirrored = [27.0, 27, 63, 63]  # (45, 45), as far as (51, 51)
    assert assigned_to([far, mirrored]) == assigned_to([mirrored, far]) == {location: 0}


def test_halfway_between_locations_the_first_one_is_taken():
    assert assigned_to([[4.0, 4, 36, 36]]) == {2 * 20 + 2: 0}  # (20, 20): 16 or 24


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_the_literal_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(60, 2, generator=generator) * torch.tensor([160.0, 128])
    size = torch.exp(torch.rand(60, 2, generator=generator) * 6) - 1
    boxes = torch.cat((corner, corner + size), dim=1)  # beyond the image, too
    expected = literal_points(boxes.tolist(), SHAPES, STRIDES)
    assert assigned_to(boxes.tolist()) == expected
    assert len(expected) < 60  # some were crowded out


def test_few_levels_and_no_boxes():
    assert list(assigned_to([[0.0, 0, 999, 999]], SHAPES[:1], [8])) == [15 * 20 + 19]
    empty = assign_points(torch.zeros(0, 4), SHAPES, STRIDES)
    assert empty.shape == (TOTAL,) and (empty == BACKGROUND).all()


def square(x, side=10.0):
    return [x, 0.0, x + side, 10.0]


def by_iou(candidates, boxes):
    return assign_by_iou(torch.tensor(candidates), torch.tensor(boxes).view(-1, 4)).tolist()


def test_positive_ignored_and_background_by_overlap():
    """Of a 10x10 box: 10/10, 5/10 and 4.5/10 of it, and 3/10."""
    candidates = [square(0), square(0, 5.0), square(0, 4.5), square(0, 3.0), square(50)]
    assert by_iou(candidates, [square(0)]) == [0, 0, IGNORED, BACKGROUND, BACKGROUND]


def test_a_box_that_nothing_overlaps_well_takes_what_overlaps_it_most():
    assert by_iou([square(7), square(8), square(50)], [square(0)]) == [0, BACKGROUND, BACKGROUND]
    assert by_iou([square(7), square(-7)], [square(0)]) == [0, 0]  # both, on a tie


def test_a_box_that_nothing_overlaps_takes_nothing():
    """Else every candidate would overlap it most: by 0."""
    assert by_iou([square(20), square(40)], [square(0)]) == [BACKGROUND] * 2
    assert by_iou([square(20), square(40)], [square(0), square(21)]) == [1, BACKGROUND]


def test_a_low_match_belongs_to_its_own_box_and_the_last_one_on_a_tie():
    """The candidate overlaps box 0 more, which has a better one."""
    candidates, boxes = [square(0), square(3)], [square(0), square(12)]
    assert by_iou(candidates, boxes) == [0, 1]
    assert by_iou([square(5)], [square(0), square(10)]) == [1]


def test_empty_candidates_and_no_boxes():
    assert by_iou([square(0)], []) == [BACKGROUND]
    points = [[3.0, 3, 3, 3]] * 4  # what an untrained head predicts
    assert by_iou(points, [square(0)]) == [BACKGROUND] * 4
