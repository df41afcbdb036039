import json
from pathlib import Path

import numpy as np
import pytest

from fgd.config import load_config
from fgd.errors import UserError
from fgd.study.arms import study_config
from fgd.study.bootstrap import ALL
from fgd.study.plan import plan
from fgd.study.summary import changes, gap_closed, spread, summarize

from .finished import finish

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
ARMS = ["student", "inherit+distil"]


def test_mean_and_deviation_over_seeds(tmp_path):
    runs = plan(CONFIG, "t.yaml", ARMS, [0, 1], tmp_path, {})
    for run, ap in zip(runs, (50.0, 20.0, 24.0, 30.0, 34.0), strict=True):
        finish(run, ap, minutes=ap)
    teacher, student, distilled = summarize(runs)
    assert [row["arm"] for row in (teacher, student, distilled)] == ["teacher", *ARMS]
    assert student["bbox"]["AP"] == {"each": [20, 24], "mean": 22, "sd": pytest.approx(8**0.5)}
    assert student["seeds"] == [0, 1] and student["minutes"] == 22 and student["iterations"] == 600
    assert student["bbox"]["AP-disc"]["mean"] == 23
    assert student["bbox"]["APs"] == {"each": [None, None], "mean": None, "sd": None}
    assert teacher["bbox"]["AP"]["sd"] is None
    assert student["seconds"] == 0.5 and student["factors"] == []  # no config.yaml says them
    assert distilled["bbox"]["gap closed"] == pytest.approx(100 * 10 / 28)
    assert teacher["bbox"]["gap closed"] is student["bbox"]["gap closed"] is None


def test_arms_without_finished_runs_have_no_row(tmp_path):
    runs = plan(CONFIG, "t.yaml", ARMS, [0, 1], tmp_path, {})
    finish(runs[1])
    (row,) = summarize(runs)
    assert row["arm"] == "student" and row["seeds"] == [0]


def test_gap():
    assert gap_closed(30, 20, 60) == 25
    assert gap_closed(10, 20, 60) == -25
    assert gap_closed(30, 60, 60) is None and gap_closed(30, 61, 60) is None
    assert spread([1.0])["sd"] is None


def test_the_factor_of_each_run_is_what_its_config_says(tmp_path):
    runs = plan(CONFIG, "t.yaml", ["student", "FGD"], [0, 1], tmp_path, {})
    for run, factor in zip(runs, (1.0, 1.0, 1.0, 0.25, 0.5), strict=True):
        finish(run)
        opts = [word for pair in run.opts.items() for word in pair]
        cfg = load_config(CONFIG if run.arm != "teacher" else "", opts)
        cfg.MODEL.DISTILLER.FACTOR = factor
        (run.folder / "config.yaml").write_text(cfg.dump())
    assert [row["factors"] for row in summarize(runs)] == [[], [], [0.25, 0.5]]


@pytest.fixture
def evaluated(tmp_path):
    """A set of ten images with one box each; the student finds the first three."""
    truth = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "disc"}]}
    for i in range(1, 11):
        truth["images"].append({"id": i, "file_name": "x.png", "width": 64, "height": 64})
        fields = {"id": i, "image_id": i, "category_id": 4, "area": 400, "iscrowd": 0}
        truth["annotations"].append({**fields, "bbox": [8, 8, 20, 20]})
    (tmp_path / "test.json").write_text(json.dumps(truth))
    (tmp_path / "x.png").touch()  # its existence is checked
    opts = {"DATASETS.JSON.TEST": str(tmp_path / "test.json")}
    runs = plan(CONFIG, "t.yaml", ARMS, [0], tmp_path / "out", opts)
    for run, found in zip(runs[1:], (3, 10), strict=True):
        detections = [
            {"image_id": i, "category_id": 4, "bbox": [8, 8, 20, 20], "score": 1 - i / 100}
            for i in range(1, found + 1)
        ]
        # 101 recalls: 0 to 0.30 are reached by 3 of 10.
        finish(run, 100 * 31 / 101 if found == 3 else 100.0)
        (run.folder / "inference").mkdir()
        path = run.folder / "inference" / "coco_instances_results.json"
        path.write_text(json.dumps(detections))
    return runs, study_config(CONFIG, opts)


def test_changes_come_from_the_saved_detections(evaluated):
    runs, cfg = evaluated
    (rows,) = changes(runs, cfg, 200).classes.values()
    (pair,) = [(r["arm"], r["against"], r["class"]) for r in rows]  # one class is all of them
    assert rows[0]["corrected"] == rows[0]["p"]  # the only comparison
    assert pair == ("inherit+distil", "student", ALL)
    assert rows[0]["difference"] == pytest.approx(100 * 70 / 101)
    assert 20 < rows[0]["low"] < rows[0]["high"] <= 100 and rows[0]["p"] < 0.02
    assert changes(runs, cfg, 200).classes["bbox"] == rows  # the same draws
    small, *others = changes(runs, cfg, 200).sizes["bbox"]  # all objects are small
    assert {**small, "class": ALL} == {**rows[0], "size": "small"}
    assert [row["size"] for row in others] == ["medium", "large"]
    assert all(np.isnan(row["p"]) and np.isnan(row["corrected"]) for row in others)


def test_detections_of_another_evaluation_are_refused(evaluated):
    runs, cfg = evaluated
    path = runs[1].folder / "inference" / "coco_instances_results.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    with pytest.raises(UserError, match="student, seed 0: .* but the saved detections give 20.79"):
        changes(runs, cfg, 10)
    path.unlink()
    with pytest.raises(UserError, match="coco_instances_results.json is missing"):
        changes(runs, cfg, 10)


def test_one_arm_alone_is_compared_with_nothing(evaluated):
    runs, cfg = evaluated
    assert changes(runs[:2], cfg, 10) == ({}, {})
    assert np.isfinite(summarize(runs)[0]["bbox"]["AP"]["mean"])
