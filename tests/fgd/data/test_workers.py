"""DataLoader workers that hang, are signalled, or lose their process."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from fgd.data.stream import build_train_stream
from fgd.data.workers import supervise, supervised_batches
from fgd.engine.evaluation import build_test_loader
from fgd.errors import UserError
from tests.fgd.training import training_cfg

fork = multiprocessing.get_context("fork")


class Hanging(torch.utils.data.Dataset):
    """Puts its worker's process id into a pipe and never gives an image."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.pipe.put(os.getpid())
        time.sleep(600)


def load_for_ever(pipe):
    list(supervised_batches(supervise(DataLoader(Hanging(pipe), num_workers=2), 0)))


def is_running(pid):
    """Not gone, and not a zombie whose new parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_workers_of_a_killed_process_die_with_it():
    pipe = fork.SimpleQueue()
    process = fork.Process(target=load_for_ever, args=(pipe,))
    process.start()
    workers = [pipe.get(), pipe.get()]
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # not from their parent
        os.kill(workers[0], signal.Signals[name])
    time.sleep(0.2)
    assert all(map(is_running, workers))
    process.kill()
    assert wait_until(lambda: not any(map(is_running, workers)))


class HangsAt:
    """A mapper that never returns for one image."""

    def __init__(self, mapper, name):
        self.mapper, self.name = mapper, name

    def __call__(self, record):
        if record["file_name"].endswith(self.name):
            time.sleep(600)
        return self.mapper(record)


@pytest.mark.parametrize("workers", [1, 2])
def test_training_images_that_hang_are_named(tmp_path, workers):
    opts = ("DATALOADER.NUM_WORKERS", workers, "DATALOADER.TIMEOUT", 1.0)
    stream = build_train_stream(training_cfg(tmp_path, opts=opts))
    expected = []
    for batch in stream.first_batches(8):
        expected.append([x["file_name"] for x in batch])
        if any(name.endswith("3.png") for name in expected[-1]):
            break
    stream.mapper = HangsAt(stream.mapper, "3.png")
    seen = []
    with pytest.raises(UserError, match="DATALOADER.TIMEOUT") as error:
        for batch in stream:
            seen.append([x["file_name"] for x in batch])
    assert seen == expected[:-1] and len(expected[-1]) == 2
    assert "within 1 s" in str(error.value)
    assert re.findall(r"[^ ]+\.png", str(error.value)) == expected[-1]
    assert not multiprocessing.active_children()


def test_test_images_that_hang_are_an_error(tmp_path):
    opts = ("DATALOADER.NUM_WORKERS", 2, "DATALOADER.TIMEOUT", 1.0)
    cfg = training_cfg(tmp_path, opts=opts)
    loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    mapped = loader.loader.dataset
    mapped._map_func._obj = HangsAt(mapped._map_func._obj, "4.png")
    seen = []
    with pytest.raises(UserError, match="have not read test batch 5 of 6 within 1 s"):
        seen.extend(batch[0]["image_id"] for batch in loader)
    assert not multiprocessing.active_children()


def test_a_slow_batch_is_waited_for_and_0_is_no_limit(tmp_path):
    for timeout in (30.0, 0.0):
        opts = ("DATALOADER.NUM_WORKERS", 1, "DATALOADER.TIMEOUT", timeout)
        stream = build_train_stream(training_cfg(tmp_path, opts=opts))
        assert len(next(iter(stream))) == 2


@pytest.mark.parametrize("timeout", [-1.0, float("inf"), float("nan")])
def test_impossible_timeouts_are_refused(tmp_path, timeout):
    with pytest.raises(UserError, match="DATALOADER.TIMEOUT: .* is not a number of seconds"):
        build_train_stream(training_cfg(tmp_path, opts=("DATALOADER.TIMEOUT", timeout)))
