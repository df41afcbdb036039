import os
import pickle
import time
from concurrent.futures import TimeoutError
from multiprocessing import active_children

import pytest

from fgd.errors import UserError
from fgd.processes import alone
from fgd.processes.alone import ALLOCATORS, MALLOC, allocators, run_alone


def test_a_process_of_its_own_with_just_these_settings(monkeypatch):
    monkeypatch.setenv(MALLOC[0], "1234")
    monkeypatch.delenv(MALLOC[1], raising=False)
    assert run_alone(os.getpid) != os.getpid()
    kept = {name: run_alone(os.getenv, name, allocator="kept") for name in MALLOC}
    assert kept == ALLOCATORS["kept"] and int(kept[MALLOC[0]]) > 2**30
    assert run_alone(os.getenv, MALLOC[0]) is None
    assert os.environ[MALLOC[0]] == "1234" and MALLOC[1] not in os.environ
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ


def test_errors_come_back():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_alone(os.stat, "nowhere")
    error = pickle.loads(pickle.dumps(UserError("found, where")))  # the way they come
    assert isinstance(error, UserError) and str(error) == "found, where"


def test_a_process_that_takes_too_long_is_killed():
    start, others = time.monotonic(), active_children()
    with pytest.raises(TimeoutError):
        run_alone(time.sleep, 60, limit=1)
    assert time.monotonic() - start < 30 and active_children() == others


def test_settings_only_where_they_matter(monkeypatch):
    monkeypatch.setattr(alone.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert allocators("cpu") == ("default", "kept")
    assert allocators("cuda:0") == ("default",)
    monkeypatch.setattr(alone.platform, "libc_ver", lambda: ("", ""))
    assert allocators("cpu") == ("default",)
