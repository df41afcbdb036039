import json
from pathlib import Path

import pytest

from fgd.errors import UserError
from fgd.study import plan, run_all, summarize, table

CONFIG = str(Path(__file__).parents[2] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")


def finish(run, ap, minutes=2.0):
    """What a training leaves behind."""
    run.folder.mkdir(parents=True)
    (run.folder / "results.json").write_text(json.dumps({"bbox": {"AP": ap, "AP50": ap + 20}}))
    (run.folder / "minutes.json").write_text(json.dumps(minutes))


def test_arms_differ_in_the_distillation_alone(tmp_path):
    arms = ["student", "inherit", "distil", "inherit+distil"]
    runs = plan(CONFIG, "teacher.yaml", arms, [0, 1], tmp_path, {"INPUT.FORMAT": "RGB"})
    assert [r.arm for r in runs] == ["teacher"] + arms * 2
    assert [r.seed for r in runs] == [0] + [0] * 4 + [1] * 4
    teacher, student, inherit, distil, both = runs[:5]
    assert teacher.opts == {"INPUT.FORMAT": "RGB"}
    assert student.opts == {"INPUT.FORMAT": "RGB", "MODEL.META_ARCHITECTURE": "RetinaNet"}
    weights = {"MODEL.DISTILLER.TEACHER.WEIGHTS": str(tmp_path / "teacher" / "model_final.pth")}
    assert distil.opts == {"INPUT.FORMAT": "RGB", "MODEL.DISTILLER.INHERIT": "False", **weights}
    assert both.opts["MODEL.DISTILLER.INHERIT"] == "True"
    assert inherit.opts["MODEL.DISTILLER.METHOD"] == ""
    assert len({r.folder for r in runs}) == len(runs)


def test_refuses_unknown_arms_and_a_missing_teacher(tmp_path):
    with pytest.raises(UserError, match="magic unknown; there are student, inherit"):
        plan(CONFIG, "t.yaml", ["magic"], [0], tmp_path, {})
    with pytest.raises(UserError, match="no teacher"):
        plan(CONFIG, "", ["distil"], [0], tmp_path, {})
    assert len(plan(CONFIG, "", ["student"], [0], tmp_path, {})) == 1


def test_finished_runs_are_not_repeated_and_are_summarized(tmp_path, capsys):
    runs = plan(CONFIG, "t.yaml", ["student", "inherit+distil"], [0, 1], tmp_path, {})
    for run, ap in zip(runs, (50.0, 20.0, 30.0, 24.0, 34.0), strict=True):
        finish(run, ap)
    run_all(runs, jobs=2)  # would fail if it trained: t.yaml does not exist
    assert capsys.readouterr().out.count("AP") == 5
    rows = {row["arm"]: row for row in summarize(runs)}
    assert rows["student"]["AP"] == [20.0, 24.0]
    assert rows["student"]["AP mean"] == 22.0
    assert rows["student"]["AP sd"] == pytest.approx(8**0.5)
    assert rows["teacher"]["AP sd"] is None and rows["teacher"]["minutes"] == 2.0
    assert "| student        | 22.0 ± 2.8 | 42.0 ± 2.8 | 20.0 24.0 " in table(list(rows.values()))


def test_a_run_that_fails_says_why(tmp_path):
    runs = plan(CONFIG, "", ["student"], [0], tmp_path, {"MODEL.DEVICE": "nowhere"})
    with pytest.raises(UserError, match="student, seed 0, exit code 2: .*nowhere"):
        run_all(runs)
