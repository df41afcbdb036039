import pytest
from detectron2.layers import ShapeSpec

from fgd.distillation.levels import (
    Outputs,
    head_levels,
    level_names,
    level_table,
    match_levels,
    parse_level_map,
    plan_levels,
)
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.fgd import FGD


def shapes(**levels):
    return {name: ShapeSpec(channels=c, stride=s) for name, (c, s) in levels.items()}


STUDENT = shapes(p3=(64, 8), p4=(64, 16), p5=(64, 32))


def test_default_levels_follow_the_paper(tiny_cfg):
    outputs = Outputs(STUDENT, {})
    for student, names in (
        ("RetinaNet", ["p3", "p4", "p5", "p6", "p7"]),
        ("FCOS", ["p3", "p4", "p5", "p6", "p7"]),
        ("GeneralizedRCNN", ["p2", "p3", "p4", "p5"]),
    ):
        cfg = tiny_cfg("GeneralizedRCNN")
        cfg.MODEL.DISTILLER.STUDENT = student
        assert head_levels(cfg) == level_names(FGD, cfg, outputs) == names
        cfg.MODEL.DISTILLER.LEVELS = ["p4"]
        assert level_names(FGD, cfg, outputs) == ["p4"]
    for other in ("Other", "Weights"):  # MODEL.WEIGHTS is no node
        cfg.MODEL.DISTILLER.update(STUDENT=other, LEVELS=[])
        with pytest.raises(UserError, match=f"{other} has no default"):
            level_names(FGD, cfg, outputs)


def test_levels_match_by_stride_whatever_their_names_and_channels():
    teacher = shapes(c2=(256, 4), c3=(256, 8), c4=(512, 16), c6=(256, 64))
    assert match_levels(["p3", "p4"], STUDENT, teacher) == [
        Level("p3", 64, 256, "c3", 8),
        Level("p4", 64, 512, "c4", 16),
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
    assert match_levels(["p3"], STUDENT, teacher, ["p3:res3"]) == [Level("p3", 64, 512, "res3", 8)]


def test_a_map_overrides_the_stride_only_where_none_is_stated():
    unstated = {"a": ShapeSpec(channels=8), "b": ShapeSpec(channels=8, stride=8)}
    with pytest.raises(UserError, match="the student's 'a' states no stride to match by; say"):
        match_levels(["a"], unstated, STUDENT)
    assert match_levels(["a", "b"], unstated, STUDENT, ["a:p4"]) == [
        Level("a", 8, 64, "p4"),
        Level("b", 8, 64, "p3", 8),
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


def test_grids_of_one_method_may_differ():
    teacher = shapes(a=(256, 4), b=(256, 8), c=(256, 32))
    by_index = match_levels(["p3", "p4"], STUDENT, teacher, same_grid=False, by_index=True)
    assert [x.teacher_name for x in by_index] == ["a", "b"]
    with pytest.raises(UserError, match="no level of stride 16 for 'p4'"):
        match_levels(["p3", "p4"], STUDENT, teacher, same_grid=False)
    mapped = match_levels(["p3", "p4"], STUDENT, teacher, ["p4:c"], same_grid=False)
    assert [x.teacher_name for x in mapped] == ["b", "c"]
    tokens = shapes(tokens=(768, 16))
    (level,) = match_levels(["p5"], STUDENT, tokens, same_grid=False)
    assert level == Level("p5", 64, 768, "tokens", 32)
    with pytest.raises(UserError, match="no level of stride 32"):
        match_levels(["p5"], STUDENT, tokens)


def test_levels_paired_by_order_are_paired_whatever_order_they_are_named_in_or_refused():
    teacher = shapes(b=(256, 8), a=(256, 4))
    options = {"same_grid": False, "by_index": True}
    found = match_levels(["p4", "p3"], STUDENT, teacher, **options)
    assert [(x.name, x.teacher_name) for x in found] == [("p4", "b"), ("p3", "a")]
    with pytest.raises(UserError, match="has only 2 levels, none for 'p5'"):
        match_levels(["p3", "p4", "p5"], STUDENT, teacher, **options)
    found = match_levels(["p3", "p4", "p5"], STUDENT, teacher, ["p5:a"], **options)
    assert [x.teacher_name for x in found] == ["a", "b", "a"]
    with pytest.raises(UserError, match="the student has no level 'p9'"):
        match_levels(["p9"], STUDENT, teacher, **options)


def test_stages_of_the_bottom_up_network_meet_stages(tiny_cfg):
    cfg = tiny_cfg()
    cfg.MODEL.DISTILLER.LEVELS = ["res5", "p3", "res4"]
    stages = shapes(res3=(8, 8), res5=(32, 32), res4=(16, 16))
    student, teacher = Outputs(STUDENT, stages), Outputs(STUDENT, shapes(c4=(7, 16), c5=(9, 32)))
    (levels,) = plan_levels(cfg, student, teacher).values()
    assert levels == [
        Level("res5", 32, 9, "c5", 32, stage=True),
        Level("p3", 64, 64, "p3", 8),
        Level("res4", 16, 7, "c4", 16, stage=True),
    ]
    assert student.finest_first() == ["res3", "res4", "res5"]
    cfg.MODEL.DISTILLER.LEVELS, cfg.MODEL.DISTILLER.LEVEL_MAP = ["res3", "p4"], ["res3:x"]
    plain = Outputs(shapes(x=(5, 8), p4=(3, 16)), {})  # a network without a neck
    (levels,) = plan_levels(cfg, student, plain).values()
    assert levels == [Level("res3", 8, 5, "x", 8, stage=True), Level("p4", 64, 3, "p4", 16)]
    (levels,) = plan_levels(cfg, student, None).values()
    assert [(level.stage, level.teacher_name) for level in levels] == [(True, ""), (False, "")]
    with pytest.raises(UserError, match="the student has no level 'res9'"):
        cfg.MODEL.DISTILLER.LEVELS, cfg.MODEL.DISTILLER.LEVEL_MAP = ["res9"], []
        plan_levels(cfg, student, teacher)
