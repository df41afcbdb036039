import pytest
from detectron2.config import get_cfg

from fgd.doctor.teacher import check_channels, check_formats, check_quality


def formats(student="BGR", teacher="BGR", teacher_mean=None):
    pair = []
    for order in (student, teacher):
        cfg = get_cfg()
        cfg.INPUT.FORMAT = order
        if order == "RGB":
            cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_MEAN[::-1]
        pair.append(cfg)
    if teacher_mean:
        pair[1].MODEL.PIXEL_MEAN = teacher_mean
    return check_formats(*pair)


def test_formats_may_differ_but_not_in_their_channels():
    assert formats().verdict == formats("BGR", "RGB").verdict == "ok"
    assert "teacher RGB, mean [123.675, 116.28, 103.53]" in formats("BGR", "RGB").found
    assert formats("BGR", "L").verdict == "FAULT"


def test_a_mean_in_the_other_order_is_suspicious():
    finding = formats("BGR", "RGB", teacher_mean=[103.53, 116.28, 123.675])
    assert finding.verdict == "warning" and "PIXEL_MEAN of the teacher" in finding.advice
    assert formats("BGR", "BGR", teacher_mean=[127.5, 127.5, 127.5]).verdict == "ok"


@pytest.mark.parametrize(
    "score, verdict", [(19.9, "FAULT"), (20.0, "ok"), (float("nan"), "warning")]
)
def test_the_floor_of_quality(score, verdict):
    finding = check_quality(score, 20.0, 8, True)
    assert finding.verdict == verdict
    assert ("DOCTOR.MIN_AP50" in finding.advice) is (verdict == "FAULT")
    assert "floor 20" in finding.found or verdict == "warning"


def test_no_floor_takes_any_teacher():
    finding = check_quality(0.0, 0.0, 8, True)
    assert finding.verdict == "ok" and finding.found.endswith("8 training images, no floor")


GIVEN = [0.5, 0.6, 0.4, 0.5, 0.6, 0.4]
SWAPPED = {
    "clearly better": ([x + 0.2 + 0.01 * (i % 2) for i, x in enumerate(GIVEN)], "FAULT"),
    "the same": (GIVEN, "ok"),
    "worse": ([x - 0.2 for x in GIVEN], "ok"),
    "surely better by very little": ([x + 0.02 for x in GIVEN], "ok"),
    "better on one image": ([0.95, *GIVEN[1:]], "ok"),
}


@pytest.mark.parametrize("case", SWAPPED)
def test_swapped_channels_must_be_clearly_better(case):
    swapped, verdict = SWAPPED[case]
    finding = check_channels(GIVEN, swapped, "RGB")
    assert finding.verdict == verdict
    assert ("set INPUT.FORMAT BGR" in finding.advice) is (verdict == "FAULT")


def test_few_images_say_nothing_about_channels():
    assert check_channels([0.1] * 3, [0.9] * 3, "BGR").verdict == "ok"
    assert check_channels([0.1] * 4, [0.9] * 4, "BGR").verdict == "FAULT"
