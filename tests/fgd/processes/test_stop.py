"""Signals at every moment of a run: it stops soon, with all saved, and goes on bit by bit."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine.train_loop import HookBase

from fgd.engine import checkpoint, evaluation
from fgd.engine.trainer import FGDTrainer
from fgd.errors import StoppedError
from fgd.processes import stop
from tests.fgd.engine.test_trainer import assert_equal, load
from tests.fgd.training import training_cfg

fork = multiprocessing.get_context("fork")


def send(name, pid=None):
    os.kill(os.getpid() if pid is None else pid, signal.Signals[name])


class At(HookBase):
    """Calls something before the step of one iteration."""

    def __init__(self, iteration, act):
        self.iteration, self.act = iteration, act

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.act()


def run(cfg, hooks=(), resume=False, after_building=lambda: None):
    torch.manual_seed(cfg.SEED)
    with stop.listening():
        trainer = FGDTrainer(cfg)
        after_building()
        trainer.resume_or_load(resume=resume)
        trainer.register_hooks(hooks)
        trainer.train()
    return trainer


OPTS = ("TEST.EVAL_PERIOD", 3)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of data, and the final checkpoint of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = training_cfg(folder, opts=OPTS)
    run(cfg)
    return folder, load(Path(cfg.OUTPUT_DIR) / "model_final.pth")


def own_run(uninterrupted, tmp_path, opts=()):
    """The same run with an OUTPUT_DIR of its own."""
    cfg = training_cfg(uninterrupted[0], opts=(*OPTS, *opts))
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


def assert_goes_on_to_the_same_end(cfg, uninterrupted):
    run(cfg, resume=True)
    final = load(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    for key in ("model", "trainer", "rng"):
        assert_equal(final[key], uninterrupted[1][key], key)


def pointer(cfg):
    return (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_in_a_step(name, uninterrupted, tmp_path):
    cfg = own_run(uninterrupted, tmp_path)
    with pytest.raises(StoppedError) as stopped:
        run(cfg, [At(4, lambda: send(name))])
    expected = f"stopped by {name} at iteration 5 of 8, all saved in {cfg.OUTPUT_DIR}"
    assert str(stopped.value) == expected and stopped.value.exit_code == 75
    assert pointer(cfg) == "model_0000004.pth"
    assert load(tmp_path / "out" / "model_0000004.pth")["iteration"] == 4
    assert_goes_on_to_the_same_end(cfg, uninterrupted)


def test_signal_during_a_save(uninterrupted, tmp_path, monkeypatch):
    """The save is finished, and not made twice."""
    cfg = own_run(uninterrupted, tmp_path)
    write, written = checkpoint.save_sealed, []

    def interrupted(data, file):
        written.append(data["iteration"])
        if data["iteration"] == 3:
            send("SIGTERM")
        write(data, file)

    monkeypatch.setattr(checkpoint, "save_sealed", interrupted)
    with pytest.raises(StoppedError, match="at iteration 5 of 8"):
        run(cfg)
    assert written == [3, 4], "the signal came after the step's agreement, so one more step is done"
    assert_goes_on_to_the_same_end(cfg, uninterrupted)
    assert load(tmp_path / "out" / "model_0000003.pth")["iteration"] == 3


def test_a_step_that_is_saved_anyway_is_saved_once(uninterrupted, tmp_path, monkeypatch):
    cfg = own_run(uninterrupted, tmp_path)
    saved = []
    write = checkpoint.save_sealed
    monkeypatch.setattr(
        checkpoint, "save_sealed", lambda data, file: saved.append(1) or write(data, file)
    )
    with pytest.raises(StoppedError, match="at iteration 4 of 8"):
        run(cfg, [At(3, lambda: send("SIGTERM"))])
    assert len(saved) == 1 and pointer(cfg) == "model_0000003.pth"


@pytest.mark.parametrize("iteration", [3, 8])
def test_signal_during_an_evaluation(iteration, uninterrupted, tmp_path, monkeypatch):
    """It ends within one image; the last one is made up for by --resume (test_cli)."""
    cfg = own_run(uninterrupted, tmp_path)
    seen = []

    def after_building():
        images = evaluation.StoppableLoader.__iter__

        def counted(loader):
            for batch in images(loader):
                seen.append(batch)
                if len(seen) == (2 if iteration == 3 else 14):  # 6 images twice before
                    send("SIGTERM")
                yield batch

        monkeypatch.setattr(evaluation.StoppableLoader, "__iter__", counted)

    with pytest.raises(StoppedError) as stopped:
        run(cfg, after_building=after_building)
    expected = f"stopped by SIGTERM during an evaluation at iteration {iteration} of 8, all saved"
    assert str(stopped.value).startswith(expected)
    assert len(seen) == (2 if iteration == 3 else 14)
    monkeypatch.undo()
    if iteration == 3:
        assert pointer(cfg) == "model_0000002.pth"
        assert_goes_on_to_the_same_end(cfg, uninterrupted)
    else:
        final = load(tmp_path / "out" / "model_final.pth")
        assert_equal(final["model"], uninterrupted[1]["model"])


def test_signal_before_the_first_step(uninterrupted, tmp_path):
    cfg = own_run(uninterrupted, tmp_path)
    with pytest.raises(StoppedError, match="SIGUSR1 at iteration 0 of 8, before a step was done"):
        run(cfg, after_building=lambda: send("SIGUSR1"))
    assert not list(tmp_path.glob("out/*.pth"))
    assert_goes_on_to_the_same_end(cfg, uninterrupted)


def test_workers_finish_their_batches(uninterrupted, tmp_path):
    """A signal for the whole process group, as Ctrl-C and schedulers send it."""
    cfg = own_run(uninterrupted, tmp_path, ("DATALOADER.NUM_WORKERS", 2))
    workers = []

    def signal_all():
        workers[:] = multiprocessing.active_children()
        pids = [str(worker.pid) for worker in workers]
        for name in ("TERM", "USR1", "INT"):  # by another process: their parent may end them
            subprocess.run(["kill", "-s", name, *pids], check=True)
        time.sleep(0.2)
        send("SIGTERM")

    with pytest.raises(StoppedError, match="at iteration 3 of 8"):
        run(cfg, [At(2, signal_all)])
    assert len(workers) == 2
    cfg.DATALOADER.NUM_WORKERS = 0
    assert_goes_on_to_the_same_end(cfg, uninterrupted)
    for worker in workers:
        worker.join(timeout=10)
        assert worker.exitcode == 0, "ended by its loader, not by a signal"


def interrupt_twice(marker):
    with stop.listening(), stop.at_once(marker.touch):
        send("SIGINT")
        assert stop.requested() == "SIGINT" and not marker.exists()
        send("SIGTERM")
        assert not marker.exists()
        send("SIGINT")
        time.sleep(60)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = fork.Process(target=interrupt_twice, args=(tmp_path / "called",))
    process.start()
    process.join(timeout=10)
    assert process.exitcode == 130 and (tmp_path / "called").exists()


def test_handlers_come_back_and_the_flag_is_of_one_run():
    before = [signal.getsignal(x) for x in stop.SIGNALS]
    with stop.listening():
        assert stop.requested() == "" == stop.agreed()
        send("SIGUSR1")
        send("SIGTERM")
        assert stop.requested() == stop.agreed() == "SIGUSR1"
    assert [signal.getsignal(x) for x in stop.SIGNALS] == before
    assert stop.requested() == ""


def test_a_process_started_meanwhile_has_them_wait():
    """Until it listens: imports take seconds, in which a signal would kill it."""
    code = (
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM); "
        "print(*sorted(x.name for x in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    )
    command = [sys.executable, "-c", code]
    with stop.held_back():
        held = subprocess.run(command, capture_output=True, text=True)
    assert held.stdout.split() == ["SIGINT", "SIGTERM", "SIGUSR1"] and held.returncode == 0
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGTERM
