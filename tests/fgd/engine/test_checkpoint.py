import multiprocessing
import os
import random
import resource
import signal
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from fgd.engine import run_folder
from fgd.engine.checkpoint import TrainingCheckpointer, loss_normalizers
from fgd.engine.hooks import SavePeriodically
from fgd.errors import UserError
from fgd.files import remove_stale_temporaries


class Trainer:
    """Stands in for the real one: one number of state."""

    value = 1

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


HEADER = {"format": "fgd-1", "config": "", "full_config": "A: {B: 1}", "classes": ["x"]}
HEADER["checksum"] = "sha256"


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
    assert make_checkpointer(tmp_path).get_checkpoint_file() == str(tmp_path / "model_final.pth")


@contextmanager
def full_disk(limit=100_000):
    """No file can be longer than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_is_explained_and_harmless(tmp_path):
    small = make_checkpointer(tmp_path)
    small.save("model_final", iteration=1)
    good = (tmp_path / "model_final.pth").read_bytes()
    big = make_checkpointer(tmp_path, nn.Linear(300, 300))
    needs_and_free = r"it needs 0.\d MiB, \d+.\d MiB are free.*--resume"
    with (
        full_disk(),
        pytest.raises(UserError, match=f"cannot write .*model_final.pth.*{needs_and_free}"),
    ):
        big.save("model_final", iteration=2)
    assert (big.last_saved, small.last_saved) == (-1, 1)
    assert (tmp_path / "model_final.pth").read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("ignore", [False, True])
def test_full_disk_stops_training_unless_told_otherwise(ignore, tmp_path, caplog):
    big = make_checkpointer(tmp_path, nn.Linear(300, 300))
    saving = SavePeriodically(big, 2, ignore_errors=ignore)
    saving.max_iter = 8
    with full_disk():
        with nullcontext() if ignore else pytest.raises(UserError, match="cannot write"):
            saving.step(1)
        assert ("training goes on, UNSAVED. cannot write" in caplog.text) is ignore
        assert os.listdir(tmp_path) == []
        with pytest.raises(UserError, match="cannot write"):
            saving.step(7)  # the end: nothing to go on to
    saving.step(3)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000003.pth"]


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
        loader = make_checkpointer(tmp_path, nn.Linear(500, 500))
        assert loader.resume_newest().path == str(tmp_path / "model_final.pth")
    remove_stale_temporaries(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]


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
    assert loader.resume_newest() == (str(tmp_path / "model_0000001.pth"), 1, False)
    assert torch.equal(torch.rand(2), expected[0]) and random.random() == expected[1]
    assert torch.equal(other.student.weight, model.student.weight)
    assert torch.equal(other.distillation.weight, model.distillation.weight)
    assert loader.trainer.value == 7 and other.student.loss_normalizer == 12.5


def test_files_that_cannot_be_resumed_are_named(tmp_path):
    path = str(tmp_path / "stock.pth")
    torch.save({"model": nn.Linear(2, 3).state_dict(), "iteration": 4}, path)
    with pytest.raises(UserError, match="stock.pth: it holds no training state of this project"):
        make_checkpointer(tmp_path).resume(path)
    make_checkpointer(tmp_path, nn.Linear(2, 4)).save("other", iteration=4)
    with pytest.raises(UserError, match=r"other.pth does not fit this config .*\[4, 2\]"):
        make_checkpointer(tmp_path).resume(str(tmp_path / "other.pth"))


def test_another_training_is_refused_and_can_be_allowed(tmp_path, caplog):
    make_checkpointer(tmp_path).save("m", iteration=4)
    data = torch.load(tmp_path / "m.pth", weights_only=True)
    del data["checksum"]
    torch.save({**data, "rng": data["rng"] * 2}, tmp_path / "m.pth")
    loader = make_checkpointer(tmp_path)
    loader.header = {**HEADER, "full_config": "A: {B: 2}"}
    before = loader.student.weight.clone()
    with pytest.raises(UserError, match="A.B: 1 -> 2; processes: 2 -> 1. Continue with"):
        loader.resume_newest()
    assert torch.equal(loader.student.weight, before)
    assert loader.resume_newest(allow_changes=True).changed
    assert "ANOTHER training than it began with: A.B: 1 -> 2; processes: 2 -> 1" in caplog.text
    assert not torch.equal(loader.student.weight, before)


def test_diverged_weights_can_be_looked_at_but_not_continued_from(tmp_path):
    saver = make_checkpointer(tmp_path)
    saver.save("model_0000001", iteration=1)
    path = saver.save_diverged(5)
    data = torch.load(path, weights_only=True)
    assert data["iteration"] == 4 and data["model"].keys() == {"weight", "bias"}
    assert os.path.basename(path) == "model_diverged_0000005.pth"
    assert saver.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    os.remove(tmp_path / "model_0000001.pth")
    with pytest.raises(UserError, match="nothing in .* can be continued from"):
        saver.resume_newest()


def test_old_checkpoints_go_after_the_new_one_is_there(tmp_path, monkeypatch):
    saver = TrainingCheckpointer(
        nn.Linear(2, 3), str(tmp_path), header=HEADER, trainer=Trainer(), keep=3
    )
    events = []
    monkeypatch.setattr(run_folder, "write_pointer", lambda *x: events.append(x[1]))
    monkeypatch.setattr(run_folder.os, "remove", lambda x: events.append(os.path.basename(x)))
    for i in range(4):
        saver.save(f"model_{i:07d}", iteration=i)
    assert events == [*(f"model_{i:07d}.pth" for i in range(4)), "model_0000000.pth"]


def test_fifty_checkpoints_leave_three_and_the_final_one(tmp_path):
    saver = TrainingCheckpointer(
        nn.Linear(2, 3), str(tmp_path), header=HEADER, trainer=Trainer(), keep=3
    )
    saving = SavePeriodically(saver, 1, ignore_errors=False)
    saving.max_iter = 50
    for i in range(50):
        saving.step(i)
        assert len(list(tmp_path.glob("model_0*.pth"))) == min(3, i + 1)
    periodic = [f"model_{i:07d}.pth" for i in (47, 48, 49)]
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", *periodic, "model_final.pth"]


def test_loss_normalizers_are_found_by_name():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    model[1].loss_normalizer = 3
    model[0].loss_normalizer = "visible"  # Mask R-CNN's keypoint head: a mode, not a number
    assert loss_normalizers(model) == {"1": 3}
