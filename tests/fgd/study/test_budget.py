import json
from pathlib import Path

import pytest

from fgd.errors import UserError
from fgd.study import budget, step_times
from fgd.study.arms import study_config
from fgd.study.budget import equal_time, read_budget, schedule, step_seconds
from fgd.study.step_times import StepTime

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
# Of a step, processor time; the clock of a student's step is 1 s, so that seconds are iterations.
SECONDS = {"student": 0.5, "inherit+distil": 0.8, "FGD": 0.8, "inherit+FGD": 0.9, "inherit": 2.0}
SECONDS |= {"distil": 3.0, "pseudo": 0.5, "pseudo+distil": 0.8, "unlabeled": 1.6}


@pytest.fixture
def cfg():
    return study_config(CONFIG, {})


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """Steps take `SECONDS`; the pairs that were timed."""
    pairs = []

    def alone(_, student, arm, *more):
        name = arm[-1]
        pairs.append(name)
        return StepTime(SECONDS[name] / 0.5, 0.5, 1.0)

    monkeypatch.setattr(step_times, "run_alone", alone)
    return pairs


def words(*arms):
    return {arm: [CONFIG, arm] for arm in arms}


def test_seconds_are_the_median_of_all_steps(tmp_path):
    for name, times in (("a", [1.0, 2.0]), ("b", [3.0, 100.0, 2.5])):
        (tmp_path / name).mkdir()
        lines = [{"iteration": i, "time": t} for i, t in enumerate(times)] + [{"iteration": 9}]
        (tmp_path / name / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert step_seconds([tmp_path / "a", tmp_path / "b", tmp_path / "none"]) == 2.5
    assert step_seconds([]) != step_seconds([])  # NaN


def test_the_whole_schedule_is_stretched_by_the_measured_ratio(cfg, tmp_path, measured):
    found = equal_time("student-long", words("student", "inherit+distil"), cfg, tmp_path, 1)
    assert found["ratio"] == pytest.approx(1.6) and found["iterations"] == 960
    assert found["seconds"] == {"student": 0.5, "inherit+distil": 0.8}
    assert measured == ["inherit+distil"]
    cfg.SOLVER.STEPS = (300, 500)
    assert schedule(found, cfg) == {
        "SOLVER.MAX_ITER": "960",
        "SOLVER.WARMUP_ITERS": "80",
        "SOLVER.STEPS": "(480, 800)",
    }
    cfg.INPUT.PLAIN_FROM = 400
    assert schedule(found, cfg)["INPUT.PLAIN_FROM"] == "640"


def test_it_is_settled_once(cfg, tmp_path, measured):
    first = equal_time("student-long", words("student", "FGD"), cfg, tmp_path, 1)
    more = words("student", "FGD", "inherit+FGD")  # a slower one, another day
    assert equal_time("student-long", more, cfg, tmp_path, 1) == first
    assert read_budget("student-long", cfg, tmp_path) == first and measured == ["FGD"]
    cfg.SOLVER.MAX_ITER = 100
    with pytest.raises(UserError, match="MAX_ITER 600, which is now 100"):
        read_budget("student-long", cfg, tmp_path)
    (tmp_path / "student-long.json").write_text("[]")
    with pytest.raises(UserError, match="not what a study writes"):
        read_budget("student-long", cfg, tmp_path)


def test_one_of_an_earlier_version_is_read(cfg, tmp_path):
    old = {"arm": "FGD", "seconds": {"student": 1.0, "FGD": 2.0}, "ratio": 2.0}
    old |= {"iterations": 1200, "scheduled": 600}
    (tmp_path / "student-long.json").write_text(json.dumps(old))
    assert equal_time("student-long", words("student", "FGD"), cfg, tmp_path, 1) == old


def test_the_student_never_gets_less_than_the_others(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(SECONDS, "FGD", 0.4)
    found = equal_time("student-long", words("student", "FGD"), cfg, tmp_path, 1)
    assert found["iterations"] == 600


def test_without_the_main_arm_it_is_the_time_of_the_slowest_method(cfg, tmp_path):
    """The config's own arm is inherit+distil; inherit has no method and does not count."""
    arms = words("student", "FGD", "inherit+FGD", "inherit", "distil")
    found = equal_time("student-long", arms, cfg, tmp_path / "a", 1)
    assert found["arm"] == "inherit+FGD" and found["iterations"] == 1080
    assert found["seconds"] == {"student": 0.5, "FGD": 0.8, "inherit+FGD": 0.9}
    arms |= words("inherit+distil")
    found = equal_time("student-long", arms, cfg, tmp_path / "b", 1)
    assert found["arm"] == "inherit+distil" and found["iterations"] == 960


# The main arm takes 600 steps of 1.6 student's steps, 960 in all, and of one second each.
@pytest.mark.parametrize(
    "arm, labelling, iterations",
    [
        ("pseudo-timed", 0.0, 960),
        ("pseudo-timed", 60.0, 900),
        ("pseudo+distil-timed", 0.0, 600),
        ("pseudo+distil-timed", 60.0, 563),  # 900 / 1.6 = 562.5
        ("pseudo+distil-timed", 958.4, 1),
        ("unlabeled-timed", 60.0, 300),  # its steps take 3.2, and it needs no labels
        ("unlabeled-timed", None, 300),
    ],
)
def test_labelling_is_part_of_the_time(cfg, tmp_path, arm, labelling, iterations):
    arms = words("student", "inherit+distil", "pseudo", "pseudo+distil", "unlabeled")
    found = equal_time(arm, arms, cfg, tmp_path, 1, labelling)
    assert found["iterations"] == iterations and found["arm"] == "inherit+distil"
    assert json.loads((tmp_path / f"{arm}.json").read_text()) == found


def test_labelling_may_leave_no_time_or_be_of_unknown_length(cfg, tmp_path):
    arms = words("student", "inherit+distil", "pseudo")
    with pytest.raises(UserError, match="took 960 s, longer than inherit.distil trains .960 s"):
        equal_time("pseudo-timed", arms, cfg, tmp_path, 1, 959.5)
    with pytest.raises(UserError, match="pseudo-timed: --labels does not say how long labelling"):
        equal_time("pseudo-timed", arms, cfg, tmp_path, 1, None)
    assert not budget.budget_file("pseudo-timed", tmp_path).exists()
