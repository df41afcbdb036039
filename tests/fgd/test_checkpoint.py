import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
from torch import nn

from fgd import checkpoint
from fgd.checkpoint import (
    TrainingCheckpointer,
    atomic_write,
    config_changes,
    last_checkpoint,
    loss_normalizers,
)
from fgd.errors import UserError


class Trainer:
    """Stands in for the real one: one number of state."""

    value = 1

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


HEADER = {"format": "fgd-1", "config": "", "full_config": "A: {B: 1}", "classes": ["x"]}


def make_checkpointer(folder, model=None):
    return TrainingCheckpointer(
        model or nn.Linear(2, 3), str(folder), header=HEADER, trainer=Trainer()
    )


# Writing


def test_order_of_writing_survives_a_power_cut(tmp_path, monkeypatch):
    """Data before name, name before pointer; and the rename itself is on the disk."""
    events = []
    replace, fsync = os.replace, os.fsync

    def record_replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        events.append(f"rename {os.path.basename(target)}")
        replace(source, target)

    def record_fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append("sync folder" if os.path.isdir(target) else "sync data")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(os, "fsync", record_fsync)
    make_checkpointer(tmp_path).save("model_final", iteration=3)
    assert events == [
        *("sync data", "rename model_final.pth", "sync folder"),
        *("sync data", "rename last_checkpoint", "sync folder"),
    ]
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "model_final.pth")


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(str(path), fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_full_disk_is_explained_and_harmless(tmp_path):
    small = make_checkpointer(tmp_path)
    small.save("model_final", iteration=1)
    good = (tmp_path / "model_final.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"cannot write .*model_final.pth.*MB are free.*--resume"
        ):
            make_checkpointer(tmp_path, nn.Linear(300, 300)).save("model_final", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "model_final.pth").read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]


def _save_forever(folder, started):
    torch.manual_seed(0)
    saver = make_checkpointer(folder, nn.Linear(500, 500))
    for i in range(10**6):
        saver.save("model_final", iteration=i)
        started.set()


def test_killed_at_any_moment_the_last_checkpoint_is_whole(tmp_path):
    """SIGKILL in a loop that does nothing but save: with a plain write most of these are lost."""
    context = multiprocessing.get_context("fork")
    for seed in range(6):
        started = context.Event()
        process = context.Process(target=_save_forever, args=(tmp_path, started))
        process.start()
        assert started.wait(30)
        time.sleep(random.Random(seed).uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        path = last_checkpoint(str(tmp_path))
        make_checkpointer(tmp_path, nn.Linear(500, 500)).resume(path)
    checkpoint.remove_stale_temporaries(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]


# Finding


def test_pointer_cases(tmp_path):
    folder, pointer = str(tmp_path), tmp_path / "last_checkpoint"
    assert last_checkpoint(folder) == ""  # a new folder: nothing to resume, no error
    (tmp_path / "model_0000004.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="last_checkpoint is missing. .*model_0000004.pth"):
        last_checkpoint(folder)
    (tmp_path.parent / "outside.pth").write_bytes(b"x")
    for name in ("", "gone.pth", "../outside.pth", str(tmp_path.parent / "outside.pth")):
        pointer.write_text(name)
        with pytest.raises(UserError, match="which is not there. .*model_0000004.pth"):
            last_checkpoint(folder)
    pointer.write_text("model_0000004.pth\n")
    assert last_checkpoint(folder) == str(tmp_path / "model_0000004.pth")


# Resuming


def test_everything_comes_back(tmp_path):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.distillation = nn.Linear(2, 2), nn.Linear(1, 1)

    model = Detector()
    model.student.loss_normalizer = 12.5
    saver = make_checkpointer(tmp_path, model)
    saver.trainer.value = 7
    saver.save("model_0000001", iteration=1)
    expected = torch.rand(2), random.random()
    data = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert data["model"].keys() == {"weight", "bias"} == data["distiller"].keys()
    assert data["iteration"] == 1 and data["classes"] == ["x"] and data["format"] == "fgd-1"

    loader = make_checkpointer(tmp_path, other := Detector())
    loader.resume(loader.get_checkpoint_file())
    assert torch.equal(torch.rand(2), expected[0]) and random.random() == expected[1]
    assert torch.equal(other.student.weight, model.student.weight)
    assert torch.equal(other.distillation.weight, model.distillation.weight)
    assert loader.trainer.value == 7 and other.student.loss_normalizer == 12.5


def test_files_that_cannot_be_resumed_are_named(tmp_path):
    path = str(tmp_path / "stock.pth")
    torch.save({"model": nn.Linear(2, 3).state_dict(), "iteration": 4}, path)
    with pytest.raises(UserError, match="stock.pth holds no training state of this project"):
        make_checkpointer(tmp_path).resume(path)
    make_checkpointer(tmp_path, nn.Linear(2, 4)).save("other", iteration=4)
    with pytest.raises(UserError, match=r"other.pth does not fit this config .*\[4, 2\]"):
        make_checkpointer(tmp_path).resume(str(tmp_path / "other.pth"))


def test_changed_config_and_process_count_are_said(tmp_path, caplog):
    make_checkpointer(tmp_path).save("m", iteration=4)
    loader = make_checkpointer(tmp_path)
    loader.header = {**HEADER, "full_config": "A: {B: 2}"}
    loader.resume(str(tmp_path / "m.pth"))
    assert "--resume with another config: A.B: 1 -> 2" in caplog.text
    assert "another teacher" not in caplog.text
    data = torch.load(tmp_path / "m.pth", weights_only=True)
    torch.save({**data, "rng": data["rng"] * 2}, tmp_path / "m.pth")
    make_checkpointer(tmp_path).resume(str(tmp_path / "m.pth"))
    assert "The run had 2 processes and has 1 now" in caplog.text


def test_a_teacher_that_was_replaced_is_said(tmp_path, caplog):
    for sha256 in ("1", "2"):
        checkpointer = make_checkpointer(tmp_path)
        checkpointer.header = {**HEADER, "teacher": {"weights": "t.pth", "sha256": sha256}}
        if sha256 == "1":
            checkpointer.save("m", iteration=4)
        checkpointer.resume(str(tmp_path / "m.pth"))
        assert ("another teacher: the content of t.pth" in caplog.text) is (sha256 == "2")


def test_config_changes_names_the_keys():
    old, new = "A: {B: 1, C: [1]}\nD: x", "A: {B: 1, C: [2]}\nE: y"
    assert config_changes(old, new) == ["A.C: [1] -> [2]", "D: x -> None", "E: None -> y"]
    assert config_changes(old, old) == []


def test_loss_normalizers_are_found_by_name():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    model[1].loss_normalizer = 3
    model[0].loss_normalizer = "visible"  # Mask R-CNN's keypoint head: a mode, not a number
    assert loss_normalizers(model) == {"1": 3}
