"""The schedule of a budget, and steps by the clock."""

import pytest

from fgd.errors import UserError
from fgd.start.pace import Pace, schedule


def test_half_of_the_budget_is_the_teachers():
    """30 minutes: 900 s / 3 s, and 900 s / (1 s + 2 s)."""
    found = schedule(Pace(student=1.0, teacher=3.0, distil=2.0), 30, batch=8, images=200)
    assert found == (300, 300, 30.0, False)
    assert found.in_words(30) == (
        "of 30 minutes the teacher gets half, 300 iterations, and student and distilled student "
        "the other half, 300 each; evaluations come on top"
    )


def test_a_small_set_is_not_read_for_ever():
    """100 rounds of 20 images in batches of 8 are 250 steps, the teacher's 200 are 500."""
    found = schedule(Pace(0.1, 0.3, 0.2), 60, batch=8, images=20)
    assert found == (250, 500, pytest.approx((250 * 0.3 + 500 * 0.3) / 60), True)
    assert found.in_words(60).endswith(
        "; 3.75 minutes are used: no more than 100 rounds through the images, of the teacher 200"
    )


def test_too_short_a_budget():
    pace = Pace(student=1.0, teacher=3.0, distil=2.0)
    found = schedule(pace, 2, batch=8, images=200)
    assert found[:2] == (20, 20)
    assert found.in_words(2).endswith("; 20 are few to learn from: give a larger --budget")
    with pytest.raises(UserError) as caught:
        schedule(pace, 0.5, batch=8, images=200)
    assert str(caught.value) == (
        "--budget 0.5: too short for 10 iterations each; give 1 minutes or more"
    )
    assert schedule(pace, 1, batch=8, images=200)[:2] == (10, 10)
