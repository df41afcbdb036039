"""Steps of two arms, timed beside each other, and what is kept of that."""

import json

import pytest
import torch
from detectron2.modeling import build_model

from fgd.config import load_config
from fgd.data.stream import TrainStream
from fgd.errors import UserError
from fgd.study import step_times
from fgd.study.step_times import FILE, Steps, StepTime, measure, time_beside
from tests.conftest import make_tiny_cfg
from tests.fgd.doctor.clinic import save_teacher, write_config
from tests.fgd.training import training_cfg


@pytest.fixture
def words(tmp_path):
    """Of a student alone, and of one that is distilled."""
    teacher = make_tiny_cfg(channels=24)
    weights = save_teacher(tmp_path / "t.pth", teacher, build_model(teacher).state_dict())
    cfg = training_cfg(tmp_path, opts=("DATALOADER.NUM_WORKERS", 2))
    path = str(write_config(cfg, tmp_path / "student.yaml"))
    distilled = ["MODEL.META_ARCHITECTURE", "Distiller", "MODEL.DISTILLER.STUDENT", "RetinaNet"]
    distilled += ["MODEL.DISTILLER.TEACHER.WEIGHTS", str(weights)]
    return {"student": [path], "FGD": [path, *distilled]}


def test_steps_are_those_of_a_training_but_nothing_is_learned(words, monkeypatch):
    seen = []
    batches = TrainStream.__iter__

    def recorded(stream):
        for batch in batches(stream):
            seen.append([x["file_name"] for x in batch])
            yield batch

    monkeypatch.setattr(TrainStream, "__iter__", recorded)
    steps = Steps(load_config(words["FGD"][0], words["FGD"][1:]))
    model = steps.step.model
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.jit.optimized_execution(False):
        steps()
        steps()
    assert model.training and steps.step.iter == 1
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert steps.step.data_loader.num_workers == 0  # in this process, whose time counts
    distilled = list(seen)
    alone = Steps(load_config(words["student"][0]))
    with torch.jit.optimized_execution(False):
        alone()
        alone()
    assert seen == distilled * 2 and len(distilled) == 2  # the same images


def test_it_is_measured_in_a_process_of_its_own(words, tmp_path, monkeypatch):
    monkeypatch.setattr(step_times, "ROUNDS", 2)
    found = measure(tmp_path / "out", words, "student", ["FGD"], 1)["FGD"]
    assert all(0 < value < 100 for value in found) and found.ratio > 1  # a teacher on top
    words["FGD"] += ["MODEL.DISTILLER.TEACHER.WEIGHTS", "none.pth"]
    with pytest.raises(UserError, match="none.pth"):
        measure(tmp_path, words, "student", ["FGD"], 1)
    assert not (tmp_path / FILE).exists()


def test_each_arm_is_measured_once(tmp_path, monkeypatch, capsys):
    calls = []

    def alone(function, student, arm, rounds, threads):
        calls.append((function, student, arm, rounds, threads))
        return StepTime(len(calls) + 0.5, 0.2, 0.1)

    monkeypatch.setattr(step_times, "run_alone", alone)
    words = {arm: [f"{arm}.yaml"] for arm in ("student", "FGD", "PKD")}
    assert measure(tmp_path, words, "student", ["FGD"], 2)["FGD"].ratio == 1.5
    assert calls == [(time_beside, ["student.yaml"], ["FGD.yaml"], 15, 2)]
    assert "timing 15 steps of FGD beside those of student" in capsys.readouterr().out
    found = measure(tmp_path, words, "student", ["PKD", "FGD"], 2)
    assert {arm: time.ratio for arm, time in found.items()} == {"PKD": 2.5, "FGD": 1.5}
    assert len(calls) == 2
    assert json.loads((tmp_path / FILE).read_text())["PKD"]["clock"] == 0.1


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"FGD": 1},
        {"FGD": {"ratio": 1}},
        {"FGD": {"ratio": 0, "student": 1, "clock": 1}},
        {"FGD": {"ratio": "x", "student": 1, "clock": 1}},
    ],
)
def test_another_file_is_no_time(tmp_path, content):
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="not what a study writes; delete it to measure the times"):
        measure(tmp_path, {}, "student", ["FGD"], 1)
