import numpy as np
import pytest

from deploy.checks.matching import (
    Decisions,
    Found,
    box_iou,
    excuse,
    match_detections,
    near_decision,
)

LINES = Decisions(score_threshold=0.05, nms_threshold=0.5, max_detections=4)


def found(*rows):
    """Rows (left, score, label): boxes of 10 x 10 pixels."""
    lefts, scores, labels = (np.array([row[i] for row in rows], float) for i in range(3))
    boxes = np.stack([lefts, lefts * 0, lefts + 10, lefts * 0 + 10], axis=-1).reshape(-1, 4)
    return Found(boxes, scores, labels.astype(int))


def test_iou_by_hand():
    a = np.array([[0, 0, 10, 10], [0, 0, 0, 5]], np.float32)
    b = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10]], np.float32)
    np.testing.assert_allclose(box_iou(a, b), [[1, 1 / 3, 0], [0, 0, 0]])
    assert box_iou(a[:0], b).shape == (0, 3)


def test_swapped_rows_match():
    expected, actual = found((0, 0.9, 1), (50, 0.9, 1)), found((50, 0.9, 1), (0, 0.9, 1))
    matching = match_detections(expected, actual)
    assert matching.pairs == [(0, 1), (1, 0)] and not matching.missing and not matching.extra


def test_label_and_place_must_agree_and_each_is_used_once():
    expected = found((0, 0.9, 1), (50, 0.8, 1), (90, 0.7, 2))
    actual = found((0, 0.9, 0), (52, 0.8, 1), (90, 0.7, 2), (90.1, 0.6, 2))
    matching = match_detections(expected, actual)  # 50 against 52: IoU 2/3
    assert matching.pairs == [(2, 2)]
    assert matching.missing == [0, 1] and matching.extra == [0, 1, 3]


@pytest.mark.parametrize("rows", [(0, 0), (0, 2), (2, 0)])
def test_empty_sides(rows):
    a, b = (found(*[(i * 50, 0.9, 1) for i in range(n)]) for n in rows)
    matching = match_detections(a, b)
    assert (matching.pairs, len(matching.missing), len(matching.extra)) == ([], *rows)


def test_only_what_is_near_a_decision_is_excused():
    other = found((200, 0.99, 1))
    assert near_decision(0, found((0, 0.0505, 1)), other, LINES)  # the score threshold
    assert not near_decision(0, found((0, 0.06, 1)), other, LINES)
    full = found(*[(i * 50, 0.9 - i * 0.1, 1) for i in range(4)])  # last score 0.6
    assert near_decision(0, found((0, 0.6005, 1)), full, LINES)
    assert not near_decision(0, found((0, 0.65, 1)), full, LINES)


def test_suppression_at_the_very_threshold_is_excused():
    """Shifted by 10/3 the IoU is 1/2; by 3.4, 0.4925; by 5, 1/3."""
    own = found((0, 0.5, 1))
    assert near_decision(0, own, found((10 / 3, 0.9, 1)), LINES)
    assert not near_decision(0, own, found((3.4, 0.9, 1)), LINES)
    assert not near_decision(0, own, found((10 / 3, 0.9, 0)), LINES)  # another class
    assert not near_decision(0, own, found((10 / 3, 0.3, 1)), LINES)  # a worse box suppresses none


def test_equal_scores_have_no_order():
    """Of two boxes with one score that suppress each other, NMS may keep either."""
    own = found((0, 1.0, 1))
    assert near_decision(0, own, found((2, 1.0, 1)), LINES)  # IoU 2/3
    assert not near_decision(0, own, found((2, 0.9999, 1)), LINES)
    assert not near_decision(0, own, found((2, 1.0, 0)), LINES)  # another class
    assert not near_decision(0, own, found((5, 1.0, 1)), LINES)  # IoU 1/3: both would be kept


def test_what_an_excused_box_suppresses_is_excused_too():
    """0 and 3 tie (IoU 7/13); keeping 0 leaves 7 (IoU 3/17 with it), keeping 3 removes it (3/7)."""
    expected = found((0, 0.9, 1), (7, 0.8, 1), (60, 0.7, 1))
    actual = found((3, 0.9, 1))
    matching = match_detections(expected, actual)
    assert excuse(matching, expected, actual, LINES) == [
        ("missing", 0, True),
        ("extra", 0, True),
        ("missing", 1, True),
        ("missing", 2, False),
    ]


def test_without_an_excused_cause_nothing_follows():
    expected, actual = found((0, 0.9, 1), (3, 0.8, 1)), found((60, 0.7, 1))
    matching = match_detections(expected, actual)
    assert [excused for _, _, excused in excuse(matching, expected, actual, LINES)] == [False] * 3


@pytest.mark.parametrize("cut, excused", [(1.0, True), (0.9, False), (1 - 5e-7, True)])
def test_what_was_cut_among_equal_scores_is_undecided(cut, excused):
    confident, nothing = found((0, 1.0, 1)), found()
    assert near_decision(0, confident, nothing, LINES._replace(cuts=[0.2, cut])) == excused
