import pytest
from detectron2.layers import ShapeSpec

from fgd.distillation.features import (
    Level,
    distilled_level_names,
    level_table,
    match_levels,
    parse_level_map,
)
from fgd.errors import UserError


def shapes(**levels):
    return {name: ShapeSpec(channels=c, stride=s) for name, (c, s) in levels.items()}


STUDENT = shapes(p3=(64, 8), p4=(64, 16), p5=(64, 32))


def test_default_levels_follow_the_paper(tiny_cfg):
    for student, names in (
        ("RetinaNet", ["p3", "p4", "p5", "p6", "p7"]),
        ("FCOS", ["p3", "p4", "p5", "p6", "p7"]),
        ("GeneralizedRCNN", ["p2", "p3", "p4", "p5"]),
    ):
        cfg = tiny_cfg("GeneralizedRCNN")
        cfg.MODEL.DISTILLER.STUDENT = student
        assert distilled_level_names(cfg) == names
        cfg.MODEL.DISTILLER.LEVELS = ["p4"]
        assert distilled_level_names(cfg) == ["p4"]
    for other in ("Other", "Weights"):  # MODEL.WEIGHTS is no node
        cfg.MODEL.DISTILLER.update(STUDENT=other, LEVELS=[])
        with pytest.raises(UserError, match=f"{other} has no default"):
            distilled_level_names(cfg)


def test_levels_match_by_stride_whatever_their_names_and_channels():
    teacher = shapes(c2=(256, 4), c3=(256, 8), c4=(512, 16), c6=(256, 64))
    assert match_levels(["p3", "p4"], STUDENT, teacher) == [
        Level("p3", 64, 256, "c3"),
        Level("p4", 64, 512, "c4"),
    ]
    # Equal names do not count.
    assert match_levels(["p3"], STUDENT, shapes(p3=(8, 16), x=(9, 8)))[0].teacher_name == "x"


def test_without_a_partner_the_error_shows_both_sides_and_what_would_do():
    teacher = shapes(p2=(256, 4), p3=(256, 8), p4=(256, 16))
    with pytest.raises(UserError) as error:
        match_levels(["p3", "p4", "p5"], STUDENT, teacher)
    text = str(error.value)
    assert "the teacher has no level of stride 32 for 'p5'" in text
    assert "MODEL.DISTILLER.LEVELS \"['p3', 'p4']\"" in text
    rows = [line.split() for line in text.splitlines()[-4:]]
    assert rows == [
        ["4", "-", "p2", "(256)", "-"],
        ["8", "p3", "(64)", "p3", "(256)", "p3", "<-", "p3"],
        ["16", "p4", "(64)", "p4", "(256)", "p4", "<-", "p4"],
        ["32", "p5", "(64)", "-", "-"],
    ]
    with pytest.raises(UserError, match=r"LEVELS \['p3', 'p3'\] names a level twice"):
        match_levels(["p3", "p3"], STUDENT, teacher)
    with pytest.raises(UserError, match="the student has no level 'p9'"):
        match_levels(["p9"], STUDENT, teacher)


def test_two_candidates_are_not_chosen_from():
    teacher = shapes(p3=(256, 8), res3=(512, 8))
    with pytest.raises(UserError, match="2 levels of stride 8 for 'p3', p3 and res3; say which"):
        match_levels(["p3"], STUDENT, teacher)
    assert match_levels(["p3"], STUDENT, teacher, ["p3:res3"]) == [Level("p3", 64, 512, "res3")]


def test_a_map_overrides_the_stride_only_where_none_is_stated():
    unstated = {"a": ShapeSpec(channels=8), "b": ShapeSpec(channels=8, stride=8)}
    with pytest.raises(UserError, match="the student's 'a' states no stride to match by; say"):
        match_levels(["a"], unstated, STUDENT)
    assert match_levels(["a", "b"], unstated, STUDENT, ["a:p4"]) == [
        Level("a", 8, 64, "p4"),
        Level("b", 8, 64, "p3"),
    ]
    assert "? " in level_table(unstated, STUDENT)
    with pytest.raises(UserError, match="the student's 'b' has stride 8, the teacher's 'p4' 16"):
        match_levels(["b"], unstated, STUDENT, ["b:p4"])
    with pytest.raises(UserError, match="LEVEL_MAP: the teacher has no level 'p9'"):
        match_levels(["b"], unstated, STUDENT, ["b:p9"])
    with pytest.raises(UserError, match="LEVEL_MAP names 'a', which is not distilled"):
        match_levels(["b"], unstated, STUDENT, ["a:p3"])


@pytest.mark.parametrize("entry", ["p3", "p3:", ":p3", "a:b:c", ""])
def test_a_map_of_another_form_is_refused(entry):
    with pytest.raises(UserError, match="is not of the form 'student:teacher'"):
        parse_level_map([entry])
    with pytest.raises(UserError, match="the student's 'p3' twice"):
        parse_level_map(["p3:p4", "p3:p5"])
    assert parse_level_map(["p3:p4", "p4:p4"]) == {"p3": "p4", "p4": "p4"}
