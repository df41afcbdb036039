import math

import numpy as np
import pytest

from fgd.doctor.calibration import calibration, check_calibration, expected_error
from fgd.doctor.scoring import judge

from .test_scoring import FAR, SQUARE, detected, labelled


def test_each_object_makes_one_detection_right():
    truth = labelled(SQUARE, FAR, classes=[0, 1])
    shifted = [12.0, 10, 32, 30]  # IoU 18 / 22
    found = detected((shifted, 0, 0.5), (SQUARE, 0, 0.9), (FAR, 0, 0.8), (FAR, 1, 0.1))

    def right(truth, found, by_class):
        """In the order of the detections, whose scores all differ."""
        scores, which = judge([truth], [found], by_class)
        known = dict(zip(np.float32(scores).tolist(), which.tolist(), strict=True))
        return [known[score] for score in found.scores.tolist()]

    assert right(truth, found, True) == [False, True, False, True]
    assert right(truth, found, False) == [False, True, True, False]
    assert right(labelled(), found, True) == [False] * 4
    assert right(labelled(SQUARE), found, True) == [False, True, False, False]  # no class 1 at all
    assert right(truth, detected(), True) == []


def test_error_by_hand():
    scores = np.array([0.95, 0.91, 1.0, 0.35, 0.31])
    right = np.array([1.0, 1, 0, 1, 0])
    # bin 0.9 to 1: |2 - 2.86|, bin 0.3 to 0.4: |1 - 0.66|, over five detections
    assert expected_error(scores, right) == pytest.approx((0.86 + 0.34) / 5)
    assert expected_error(np.array([0.0]), np.array([0.0])) == 0


def test_over_images_by_hand():
    truth = [labelled(SQUARE), labelled(FAR), labelled()]
    found = [detected((SQUARE, 0, 0.8)), detected((SQUARE, 0, 0.4)), detected()]
    got = calibration(truth, found, True)
    assert got[:3] == (2, pytest.approx(0.6), 0.5)
    assert got.ece == pytest.approx((0.2 + 0.4) / 2)
    assert got.log_loss == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    text = check_calibration(got, 3).found
    assert "mean score 0.60, 50 % right of 2 detections on 3" in text
    assert "sure too often; detection ECE 0.300, log-loss 0.367" in text


def test_certain_and_wrong_is_finite_and_nothing_is_said():
    got = calibration([labelled()], [detected((SQUARE, 0, 1.0))], True)
    assert got.log_loss == pytest.approx(-math.log(1e-6), rel=1e-6) and got.ece == 1
    nothing = calibration([labelled(SQUARE)], [detected()], True)
    assert nothing.detections == 0 and math.isnan(nothing.ece)
    assert check_calibration(nothing, 1).found == "the teacher detects nothing on 1 images"


def test_scores_that_are_probabilities_have_no_error_but_chance():
    random = np.random.default_rng(0)
    scores = random.random(40000)
    right = (random.random(40000) < scores).astype(float)
    assert expected_error(scores, right) < 0.01
    assert expected_error(scores**2, right) == pytest.approx(1 / 6, abs=0.01)
