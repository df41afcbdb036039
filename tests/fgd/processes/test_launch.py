import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from fgd.errors import UserError
from fgd.processes import stop
from fgd.processes.launch import (
    WorkerError,
    _cause,
    _free_port,
    _join,
    _Report,
    _watch,
    check_processes,
    launch,
    one_line,
)
from tests.fgd.data.test_workers import is_running, wait_until
from tests.fgd.training import distilled, training_cfg

from . import ranks


def test_one_process_is_this_one():
    assert launch(lambda x: x + 1, (4,), device="cpu") == 5


def test_processes_that_do_not_meet_are_one_line(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(f"{_join.__module__}.TIMEOUT", 0.0)
    url = f"tcp://127.0.0.1:{_free_port()}"
    try:
        with pytest.raises(UserError, match=f"rank 0: not all 2 processes met at {url} within 1 s"):
            _join("cpu", url, 0, 2, 0, 1, timeout=1.0)
    finally:
        torch.set_num_threads(threads)


def test_two_cpu_processes_train_one_model_and_stop_together(tmp_path):
    """Equal weights on both ranks, while distillation rests and while it works. A signal to rank 1
    alone stops both after one step, all saved; a NaN on rank 1 alone makes neither of them step.
    """
    opts = ("SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.DISTILLER.SCHEDULE.START", 1)
    cfg = distilled(training_cfg(tmp_path, opts=opts), tmp_path)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = (str(tmp_path / "config.yaml"),)
    assert launch(ranks.train, arguments, device="cpu", processes=2) == 0
    a, b = (torch.load(tmp_path / f"rank{i}.pth", weights_only=True) for i in range(2))
    assert [(x["local_rank"], x["local_size"]) for x in (a, b)] == [(0, 2), (1, 2)]
    for result in (a, b):
        assert result["stopped"].startswith("stopped by SIGUSR1 at iteration 1 of 8, all saved in")
        assert {"model_0000000.pth", "last_checkpoint"} <= set(result["files"])
        assert result["iteration"] == 2
        assert f"images of rank 1: {', '.join(b['images'])}" in result["message"]
        assert "iteration 2: a loss became infinite or NaN on rank 1 (" in result["message"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert set(a["images"]).isdisjoint(b["images"])
    assert (tmp_path / "out" / "model_diverged_0000002.pth").exists()
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    saved = torch.load(tmp_path / "out" / "model_0000001.pth", weights_only=True)
    assert len(saved["rng"]) == len(saved["trainer"]["loss_normalizers"]) == 2
    assert not torch.equal(saved["rng"][0]["torch"], saved["rng"][1]["torch"])
    moved = 0
    for name, value in saved["model"].items():
        trained = a["model"].get(f"module.student.{name}")
        moved += not torch.equal(value, a["initial"][f"student.{name}"])
        assert trained is None or torch.equal(value, trained)
    assert moved > 10


def test_two_processes_distil_as_one(tmp_path):
    """DDP's mean of the gradients of two halves of a batch is the whole batch's gradient, without
    boxes on one rank or all as well, and ten steps with it end within 1e-6 of one process's.
    """
    assert launch(ranks.distil, (str(tmp_path),), device="cpu", processes=2) == 0
    whole = []
    for empty in ranks.EMPTY:
        model = ranks.Distilled()
        model(*ranks.distillation_batch(empty)).backward()
        whole.append({name: x.grad for name, x in model.named_parameters()})
    alone = ranks.Distilled().float()
    start = {name: value.clone() for name, value in alone.state_dict().items()}
    ranks.ten_steps(alone)
    moved = [(value - start[name]).abs().max() for name, value in alone.state_dict().items()]
    assert max(moved) > 1e-2, "vacuous: ten steps changed nothing"
    for rank in range(2):
        result = torch.load(tmp_path / f"distilled{rank}.pth", weights_only=True)
        for name, value in alone.state_dict().items():
            assert (result["weights"][name] - value).abs().max() < 1e-6, name
        for found, wanted in zip(result["gradients"], whole, strict=True):
            assert found.keys() == wanted.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_killed_or_hung_process_ends_the_job(capfd):
    """The cause is named, not what followed; nobody is left; the port can be used again."""
    url = f"tcp://127.0.0.1:{_free_port()}"
    with pytest.raises(WorkerError, match="^process 1 terminated with signal SIGKILL") as error:
        launch(ranks.die_on_rank_1, device="cpu", processes=2, dist_url=url)
    assert error.value.exit_code == 1 and not multiprocessing.active_children()
    with pytest.raises(WorkerError, match="^process 1 hung, .*: .*[Tt]imed out") as error:
        launch(ranks.hang_on_rank_1, device="cpu", processes=2, dist_url=url, timeout=2)
    assert error.value.exit_code == 1 and not multiprocessing.active_children()
    assert "in never_ready" in capfd.readouterr().err


def test_a_worker_that_hangs_on_one_rank_ends_the_job(tmp_path):
    cfg = training_cfg(tmp_path, opts=("DATALOADER.TIMEOUT", 1.0))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = (str(tmp_path / "config.yaml"),)
    with pytest.raises(
        WorkerError, match=r"^the DataLoader's workers have not read .*\.png"
    ) as error:
        launch(ranks.hang_in_a_worker_of_rank_1, arguments, device="cpu", processes=2)
    assert error.value.exit_code == 2 and "rank 1:" in error.value.details
    assert not multiprocessing.active_children()


def ignore_sigterm(seconds):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(seconds)


def watch_two(pipe):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=ignore_sigterm, args=(60,)) for _ in range(2)]
    for process in processes:
        process.start()
    with stop.listening():
        pipe.put([process.pid for process in processes])
        _watch(processes, fork.SimpleQueue())


def test_a_second_ctrl_c_ends_all_processes_at_once():
    fork = multiprocessing.get_context("fork")
    pipe = fork.SimpleQueue()
    launcher = fork.Process(target=watch_two, args=(pipe,))
    launcher.start()
    pids = pipe.get()
    os.kill(launcher.pid, signal.SIGINT)
    time.sleep(0.5)
    assert launcher.is_alive() and all(map(is_running, pids)), "the first one lets them finish"
    os.kill(launcher.pid, signal.SIGINT)
    launcher.join(timeout=20)
    assert launcher.exitcode == 130
    assert wait_until(lambda: not any(map(is_running, pids)))


def report(rank, code, message="Connection closed by peer"):
    return _Report(rank, message, code, "")


@pytest.mark.parametrize(
    ("codes", "reports", "silent", "message", "code"),
    [
        # A rank that knows what is wrong, although another lost its connection to it first.
        ([1, 2], [report(0, 1), report(1, 2, "cannot read a.png")], [], "^cannot read a.png$", 2),
        ([3, None], [report(0, 3, "diverged")], [1], "^diverged$", 3),
        # The kernel's choice when memory is short, before what the others make of it.
        ([1, -9], [report(0, 1)], [], "^process 1 terminated with signal SIGKILL; was the m", 1),
        ([-11, 1], [report(1, 1)], [], "^process 0 terminated with signal SIGSEGV$", 1),
        # NCCL ends a process that waits in vain by SIGABRT: the other one is to blame.
        ([-6, None], [], [1], r"exit codes \[-6, None\]; process 1 did not answer", 1),
        ([1, 1], [report(1, 1, "a bug"), report(0, 1)], [], "^a bug$", 1),
        ([1, None], [report(0, 1, "a bug")], [1], "^a bug; process 1 did not answer", 1),
    ],
)
def test_the_first_cause_is_named(codes, reports, silent, message, code):
    error = _cause(codes, reports, silent)
    assert re.search(message, str(error)) and error.exit_code == code


def test_torchrun_environment_is_joined(monkeypatch):
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)

    def main():
        assert dist.get_backend() == "gloo" and comm.get_local_rank() == 0
        return 7

    assert launch(main, device="cpu", processes=8) == 7
    assert not dist.is_initialized()


@pytest.mark.parametrize("of_several", [True, False])
def test_a_process_of_several_leaves_at_once(of_several):
    """What else would run at its end can abort it, long after it has succeeded."""
    program = (
        "import atexit, sys; from fgd.processes.launch import leave\n"
        "atexit.register(print, 'late'); sys.stdout.write('said'); leave(7)"
    )
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = os.environ | dict.fromkeys([*keys, "TORCHELASTIC_RUN_ID"] * of_several, "0")
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert result.returncode == 7
    assert result.stdout == ("said" if of_several else "saidlate\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cpu", 0, 1, 0, "auto"), "--num-gpus 0"),
        (("cpu", 1, 2, 2, "tcp://h:1"), "--machine-rank 2"),
        (("cpu", 1, 2, 1, "auto"), "--dist-url tcp://HOST:PORT"),
        (("cuda", 99, 1, 0, "auto"), "--num-gpus 99, but this machine has"),
    ],
)
def test_impossible_counts_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        check_processes(*arguments)


def test_one_line_of_an_error():
    assert one_line(ValueError("a\nb")) == "b"
    assert one_line(EOFError()) == "EOFError"
