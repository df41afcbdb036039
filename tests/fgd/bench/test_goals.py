from fgd.bench.goals import Goal, loss_goals, step_bound, step_goal


def row(boxes, implementation="torch", speedup=3.5, over_fewest=1.0, peak=1.1, held=0.02):
    return {
        "implementation": implementation,
        "boxes": boxes,
        "speedup": speedup,
        "over_fewest": over_fewest,
        "peak_u": peak,
        "held_u": held,
    }


def test_bounds_hold_with_equality_and_nothing_measured_is_not_met():
    assert Goal("", 3.0, 3.0, at_least=True).met and not Goal("", 3.0, 2.99, at_least=True).met
    assert Goal("", 1.25, 1.25).met and not Goal("", 1.25, 1.26).met
    assert Goal("", 1.25, float("nan")).met is False
    unknown = Goal("peak, U", 1.25, None)
    assert unknown.met is None and unknown.line() == "peak, U ≤ 1.25: not measured"
    assert Goal("speed", 3.0, 2.5, at_least=True).line() == "speed ≥ 3: 2.5, MISSED"


def test_a_step_is_judged_by_what_its_method_needs():
    maps, heads = {"teacher", "maps"}, {"teacher", "region_logits"}
    assert step_bound("Any", maps, 0) == step_bound("Any", {"maps"}, 0) == (1.05, "")
    assert step_bound("Any", heads, 0) == step_bound("Any", heads | maps, 0) == (1.15, "")
    assert step_bound("Any", heads, 1000) == (1.15, "")  # modules on regions
    for needs in (maps, heads | maps, {"maps"}, heads | {"student_maps"}):
        assert step_bound("Any", needs, 1000) == (None, "it trains modules on maps")
    bound, reason = step_bound("Any", maps | {"second_view"}, 0)
    assert bound is None and "twice" in reason
    assert step_bound("FGD", maps, 1000) == (1.05, "")
    line = step_goal("Any", 1.05, 1.04).line()
    assert line == "Any: distillation step over student step + teacher forward ≤ 1.05: 1.04, met"
    line = step_goal("Any", 1.15, 1.16, taught=False).line()
    assert line == "Any: distillation step over student step ≤ 1.15: 1.16, MISSED"


def verdicts(*rows):
    return [goal.met for goal in loss_goals(list(rows))]


def test_each_goal_of_the_loss_judges_its_own_figure():
    slow = row(50, "composed", 1.0, 9.0, 9.0, 9.0)  # not meant to be fast: not judged
    assert verdicts(row(1), row(50), row(300), slow) == [True] * 4
    for fault, index in (({"speedup": 2.9}, 0), ({"peak": 1.3}, 1), ({"held": 0.2}, 2)):
        wanted = [i != index for i in range(4)]
        assert verdicts(row(1), row(50, **fault), row(300)) == wanted
    assert verdicts(row(1), row(50), row(300, over_fewest=1.2)) == [True, True, True, False]


def test_goals_of_boxes_that_were_not_measured_and_of_kernels():
    assert verdicts(row(1), row(10)) == [None, True, True, None]
    assert verdicts(row(10), row(300)) == [None, True, True, None]
    kernels = [row(50), row(50, "triton", speedup=6.9)]
    assert verdicts(*kernels)[0] is True and verdicts(*kernels)[4] is False
    assert verdicts(row(50, "triton", speedup=7.0))[0] is True
    assert verdicts(row(50, "composed")) == []
