import json
import logging
import multiprocessing
import os
import signal
import socket

import pytest

from fgd.errors import UserError
from fgd.processes.lock import folder_lock
from fgd_inputs import folder_lock as shared

FORK = multiprocessing.get_context("fork")


def hold(folder, held):
    with folder_lock(str(folder)):
        # A worker, as a DataLoader has: it must not keep the lock when this process is killed.
        worker = FORK.Process(target=signal.pause, daemon=True)
        worker.start()
        held.send(worker.pid)
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock, and its child."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, there))
    process.start()
    assert here.poll(30)
    child = here.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, signal.SIGKILL)


def test_the_second_run_is_refused_until_the_first_is_gone(tmp_path, holder, caplog):
    caplog.set_level(logging.INFO, "fgd")
    owner = f"pid {holder.pid} on {socket.gethostname()} since 20"
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(UserError, match="in use by another training run") as error:
            with folder_lock(str(tmp_path)):
                pass
        assert owner in str(error.value) and error.value.exit_code == 2
    holder.kill()
    holder.join()
    with folder_lock(str(tmp_path)):
        assert f"The run before this one ({owner}" in caplog.text
        assert json.loads((tmp_path / ".fgd_lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".fgd_lock").read_text() == ""
    caplog.clear()
    with folder_lock(str(tmp_path)):
        pass
    assert not caplog.records


def test_a_lock_that_another_machine_left_is_explained(tmp_path, caplog):
    owner = {"pid": 7, "host": "node17", "since": "2026-01-01"}
    (tmp_path / ".fgd_lock").write_text(json.dumps(owner))
    with folder_lock(str(tmp_path)):
        assert "pid 7 on node17 since 2026-01-01) did not end in order" in caplog.text


def test_a_file_system_without_locks_is_said(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(shared.fcntl, "lockf", refuse)
    with folder_lock(str(tmp_path)):
        assert "cannot be locked (No locks available)" in caplog.text
    (tmp_path / ".fgd_lock").write_text("rubbish")
    with folder_lock(str(tmp_path)):
        pass
