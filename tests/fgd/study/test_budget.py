import json
from pathlib import Path

import pytest

from fgd.errors import UserError
from fgd.study.arms import study_config
from fgd.study.budget import long_budget, long_schedule, step_seconds
from fgd.study.plan import plan

from .finished import finish

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
ARMS = ["student", "inherit+distil", "student-long"]


@pytest.fixture
def study(tmp_path):
    """Runs of two seeds: the student's steps take 0.5 s, the distilled one's 0.8 s."""
    cfg = study_config(CONFIG, {})
    runs = plan(CONFIG, "t.yaml", ARMS, [0, 1], tmp_path, {})
    for run in runs:
        if run.arm in ARMS[:2]:
            finish(run, step=0.5 if run.arm == "student" else 0.8)
    return runs, cfg, tmp_path


def test_seconds_are_the_median_of_all_steps(tmp_path):
    for name, times in (("a", [1.0, 2.0]), ("b", [3.0, 100.0, 2.5])):
        (tmp_path / name).mkdir()
        lines = [{"iteration": i, "time": t} for i, t in enumerate(times)] + [{"iteration": 9}]
        (tmp_path / name / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert step_seconds([tmp_path / "a", tmp_path / "b", tmp_path / "none"]) == 2.5
    assert step_seconds([]) != step_seconds([])  # NaN


def test_the_whole_schedule_is_stretched_by_the_measured_ratio(study):
    runs, cfg, output = study
    budget = long_budget(runs, cfg, output)
    assert budget["ratio"] == pytest.approx(1.6) and budget["iterations"] == 960
    assert budget["seconds"] == {"student": 0.5, "inherit+distil": 0.8}
    cfg.SOLVER.STEPS = (300, 500)
    assert long_schedule(budget, cfg) == {
        "SOLVER.MAX_ITER": "960",
        "SOLVER.WARMUP_ITERS": "80",
        "SOLVER.STEPS": "(480, 800)",
    }
    cfg.INPUT.PLAIN_FROM = 400
    assert long_schedule(budget, cfg)["INPUT.PLAIN_FROM"] == "640"


def test_it_is_measured_once(study):
    runs, cfg, output = study
    first = long_budget(runs, cfg, output)
    for run in runs[1:3]:
        finish(run, step=0.001)
    assert long_budget(runs, cfg, output) == first
    cfg.SOLVER.MAX_ITER = 100
    with pytest.raises(UserError, match="MAX_ITER 600, which is now 100"):
        long_budget(runs, cfg, output)


def test_the_student_never_gets_less_than_the_others(study):
    runs, cfg, output = study
    for run in runs[1:3]:
        finish(run, step=5.0)
    assert long_budget(runs, cfg, output)["iterations"] == 600


def times_of(tmp_path, seconds):
    """Runs of these arms and of student-long, with finished ones' step times."""
    runs = plan(CONFIG, "t.yaml", ["student-long", *seconds], [0], tmp_path, {})
    for run in runs:
        if run.arm in seconds:
            finish(run, step=seconds[run.arm])
    return runs


def test_without_the_main_arm_it_is_the_time_of_the_slowest_method(tmp_path):
    """The config's own arm is inherit+distil; inherit has no method and does not count."""
    cfg = study_config(CONFIG, {})
    seconds = {"student": 0.5, "FGD": 0.8, "inherit+FGD": 0.9, "inherit": 2.0, "distil": 3.0}
    budget = long_budget(times_of(tmp_path / "a", seconds), cfg, tmp_path / "a")
    assert budget["arm"] == "inherit+FGD" and budget["iterations"] == 1080
    assert budget["seconds"] == {"student": 0.5, "FGD": 0.8, "inherit+FGD": 0.9}
    seconds["inherit+distil"] = 0.6
    budget = long_budget(times_of(tmp_path / "b", seconds), cfg, tmp_path / "b")
    assert budget["arm"] == "inherit+distil" and budget["iterations"] == 720


def test_every_method_must_have_finished(tmp_path):
    runs = times_of(tmp_path, {"student": 0.5, "FGD": 0.8, "inherit+FGD": 0.9})
    (tmp_path / "FGD_0" / "results.json").unlink()
    with pytest.raises(UserError, match="no finished run of FGD says how long a step takes"):
        long_budget(runs, study_config(CONFIG, {}), tmp_path)


def test_unfinished_runs_do_not_count(study):
    runs, cfg, output = study
    for run in runs:
        (run.folder / "results.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no finished run of student says how long"):
        long_budget(runs, cfg, output)
    assert not (output / "student-long.json").exists()
