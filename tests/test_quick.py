"""tools/quick.py: each of its checks fails when it should, and the other detectors still run."""

import json
import subprocess

import pytest

from tools import quick


def lines(classification, distillation=None):
    """metrics.json of a run with two losses that classify, and a box loss that rises."""
    yield {"iteration": 0, "data_time": 1.0}
    for position, value in enumerate(classification):
        line = {"total_loss": 99.0, "loss_cls_stage0": value / 2, "loss_rpn_cls": value / 2}
        line |= {"loss_box_reg": 10 + position, "lr": 0.1}
        if distillation:
            line["loss_fgd_foreground"] = distillation[position]
            line["distill/p3"] = 7.0
        yield line
    yield {"bbox/AP": 3.0}


def test_losses_are_summed_first_and_last():
    assert quick.loss_changes(list(lines([4, 9, 2]))) == {"classification": [4, 2]}
    changes = quick.loss_changes(list(lines([4, 9, 2], [1, 5, 0.5])))
    assert changes == {"classification": [4, 2], "distillation": [1, 0.5]}


FALLING = {"classification": [2.0, 1.0], "distillation": [2.0, 1.0]}


@pytest.mark.parametrize(
    "role, losses, ap50, said",
    [
        ("fgd", FALLING, {"bbox": 20.0, "segm": 20.0}, None),
        ("teacher", {"classification": [2.0, 1.0]}, {"bbox": 5.0}, None),
        ("fgd", {"classification": [2.0, 1.0]}, {"bbox": 20.0}, "its losses are classification"),
        ("teacher", FALLING, {"bbox": 20.0}, "its losses are classification, distillation"),
        (
            "fgd",
            {**FALLING, "classification": [2.0, 2.0]},
            {"bbox": 20.0},
            "classification loss went from 2",
        ),
        ("fgd", {**FALLING, "distillation": [2.0, 1.95]}, {"bbox": 20.0}, "distillation loss went"),
        ("fgd", {**FALLING, "classification": [2.0, float("nan")]}, {"bbox": 20.0}, "to nan"),
        ("fgd", FALLING, {"bbox": 4.9}, "bbox AP50 is 4.9, below 5.0"),
        ("fgd", FALLING, {"bbox": 20.0, "segm": 1.0}, "segm AP50 is 1.0"),
        ("fgd", FALLING, {"bbox": float("nan")}, "bbox AP50 is nan"),
    ],
)
def test_a_run_passes_or_says_why_not(role, losses, ap50, said):
    if said is None:
        quick.check_run(role, losses, ap50)
        return
    with pytest.raises(quick.Failed) as caught:
        quick.check_run(role, losses, ap50)
    assert said in str(caught.value)


def test_detecting_nothing_is_an_ap_of_zero():
    assert quick.metric({"iteration": 5, "bbox": {"AP": None}}, "AP") == {"bbox": 0.0}
    both = {"bbox": {"AP": 3.0}, "segm": {"AP": 2.0}}
    assert quick.metric(both, "AP") == {"bbox": 3.0, "segm": 2.0}


@pytest.fixture
def commands(monkeypatch):
    """Commands that write what a good run writes; change an entry to plant a fault."""
    faults = {"code": {}, "ap50": 50.0}

    def run(words, stdout, **_):
        _, script, *options = words
        script = script.rsplit("/", 1)[-1]
        stdout.write("error: planted\n")
        given = dict(zip(options[::2], options[1::2]))
        if script == "train_net.py":
            folder = quick.Path(given["OUTPUT_DIR"])
            distilled = "MODEL.DISTILLER.TEACHER.WEIGHTS" in given
            metrics = lines([4, 2], [2, 1] if distilled else None)
            (folder / "metrics.json").write_text("\n".join(map(json.dumps, metrics)))
            box = {"AP": 25.0, "AP50": faults["ap50"]}
            (folder / "results.json").write_text(json.dumps({"iteration": 150, "bbox": box}))
        else:
            folder = quick.Path(options[0]).with_name("model_final_onnx")
            folder.mkdir()
            tally = {"matched": 7, "expected": 7}
            (folder / "report.json").write_text(json.dumps({"verification": {"tally": tally}}))
        return subprocess.CompletedProcess(words, faults["code"].get(script, 0))

    monkeypatch.setattr(quick.subprocess, "run", run)
    return faults


def test_a_row_per_detector_and_exit_code_0(commands, tmp_path, capsys):
    assert quick.main(["--output", str(tmp_path), "--only", "fcos", "frcnn"]) == 0
    rows = json.loads((tmp_path / "quick.json").read_text())
    assert [(row["detector"], row["failed"]) for row in rows] == [("fcos", None), ("frcnn", None)]
    assert rows[0]["fgd"]["AP"] == {"bbox": 25.0} and rows[0]["graph"]["matched"] == 7
    page = (tmp_path / "quick.md").read_text()
    assert page.count("7 of 7") == 2 and page.count("passed") == 2
    assert "fcos: passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault, said, missing",
    [
        ({"code": {"train_net.py": 3}}, "exit code 3, error: planted", "teacher"),
        ({"code": {"export.py": 4}}, "export.py: exit code 4, error: planted", "graph"),
        ({"ap50": 1.0}, "teacher: bbox AP50 is 1.0", "teacher"),
    ],
    ids=str,
)
def test_a_failure_is_said_and_the_others_still_run(commands, fault, said, missing, tmp_path):
    commands.update(fault)
    assert quick.main(["--output", str(tmp_path), "--only", "fcos", "frcnn"]) == 1
    rows = json.loads((tmp_path / "quick.json").read_text())
    assert all(said in row["failed"] and missing not in row for row in rows) and len(rows) == 2
    assert (tmp_path / "quick.md").read_text().count(said) == 2


def test_nothing_is_kept_of_an_earlier_run(commands, tmp_path):
    stale = tmp_path / "fgd_fcos" / "model_final_onnx"
    stale.mkdir(parents=True)
    assert quick.main(["--output", str(tmp_path), "--only", "fcos"]) == 0
    assert (stale / "report.json").exists()  # the planted command would have met the old folder


def test_every_detector_with_a_quick_config_is_in(capsys):
    assert {"retinanet", "frcnn", "mask_rcnn", "cascade", "fcos"} <= set(quick.detectors())
    with pytest.raises(SystemExit):
        quick.main(["--only", "yolo"])
    assert "invalid choice: 'yolo'" in capsys.readouterr().err
