"""Files appear whole or not at all."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from deploy.errors import UserError
from deploy.files import write_atomically, write_json


def test_writes_in_a_new_folder_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    for value in ({"größe": 1.5}, {"größe": 2.5}):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    write_atomically(path, b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match=r"x\.bin: No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_nan_and_impossible_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"ap": float("nan")})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make folder .*file"):
        write_json(tmp_path / "file" / "x.json", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def _write_forever(path, started):
    for i in range(10**6):
        write_atomically(path, bytes([i % 256]) * 2**22)
        started.set()


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    """SIGKILL in a loop that does nothing but write: with a plain write most of these are lost."""
    path, context = tmp_path / "model.onnx", multiprocessing.get_context("fork")
    for seed in range(6):
        started = context.Event()
        process = context.Process(target=_write_forever, args=(path, started))
        process.start()
        assert started.wait(30)
        time.sleep(random.Random(seed).uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        content = path.read_bytes()
        assert len(content) == 2**22 and content == content[:1] * 2**22
