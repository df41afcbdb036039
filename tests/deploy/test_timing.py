"""Rounds alternate, warm-up does not count, percentiles are right, noise is called noise."""

import subprocess
import sys
import time

import numpy as np
import pytest

from deploy.speed.timing import Timing, describe_machine, interleave, noise, peak_memory


def test_rows_alternate_and_warmup_is_not_counted():
    calls = []
    rows = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleave(rows, repeats=4, warmup=2)
    assert calls == list("abc") * 6
    assert {name: timing.wall.shape for name, timing in timings.items()} == dict.fromkeys(
        "abc", (4,)
    )


def test_rounds_are_shown_where_someone_watches(monkeypatch, capsys):
    interleave({"a": int}, repeats=3, warmup=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    interleave({"a": int}, repeats=3, warmup=1)
    bars = [f"\r[{'#' * (30 * i // 4):.<30}] {i}/4 rounds" for i in range(1, 5)]
    assert capsys.readouterr() == ("", "".join(bars) + "\n")


def test_clock_and_cpu_time_are_told_apart():
    def work(until=None):
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass

    timings = interleave({"sleep": lambda: time.sleep(0.02), "work": work}, 3, 0)
    assert timings["sleep"].wall.min() >= 0.02 and timings["sleep"].cpu.max() < 0.01
    assert timings["work"].cpu.min() >= 0.02


def test_summary_in_milliseconds_per_call_and_images_per_second():
    summary = Timing(np.arange(1, 102) / 1000, np.full(101, 0.05)).summary(images=4)
    assert summary == pytest.approx(
        {
            "p50_ms": 51,
            "p90_ms": 91,
            "p99_ms": 100,
            "images_per_second": 4 / 0.051,
            "cpu_ms": 50,
            "repeats": 101,
        }
    )


def timing(wall, cpu=None):
    return Timing(np.array(wall), np.array(wall if cpu is None else cpu))


def test_noise_names_each_reason(monkeypatch):
    monkeypatch.setattr("deploy.speed.timing.available_cores", lambda: 2)
    quiet = {"graph": timing([1.0, 1.01, 1.02])}
    assert noise(quiet, 0.1, threads=2) == noise(quiet, 1.0, threads=1) == []
    assert noise(quiet, None, threads=2) == []
    (reason,) = noise(quiet, 1.5, threads=1)
    assert reason == "load average 1.50 left 0.5 cores for 1 threads"
    spread = {**quiet, "other": timing([1.0] * 8 + [2.0] * 2), "third": timing([1.0, 1.0, 1.5])}
    assert noise(spread, 0.0, 1) == ["p90 is up to 2.00 x p50 (other)"]
    waiting = {**quiet, "other": timing([1.0] * 3, cpu=[0.5] * 3)}
    assert noise(waiting, 0.0, 1) == ["on a CPU for only 50% of the time (other)"]
    assert noise(waiting, 0.0, 1, on_cpu=False) == []


def test_machine_says_what_a_figure_depends_on():
    machine = describe_machine()
    assert machine["cpu"] and machine["available_cores"] >= 1
    assert machine["versions"]["numpy"] == np.__version__
    assert any(name.startswith("onnxruntime") for name in machine["versions"])


def test_peak_memory_is_the_childs_own():
    """A child started from a large process must not report its parent's peak."""
    if sys.platform != "linux":
        assert peak_memory() is None
        return
    ballast = np.ones(40_000_000)  # 320 MB
    code = "from deploy.speed.timing import peak_memory; print(peak_memory())"
    child = int(subprocess.check_output([sys.executable, "-c", code]))
    assert peak_memory() > ballast.nbytes > 2 * child > 2_000_000
