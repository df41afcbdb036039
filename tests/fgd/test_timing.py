from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fgd import timing
from fgd.timing import Times, alternate, describe_machine, noise, ratio

CPU = torch.device("cpu")


def test_rows_alternate_with_a_reset_before_each_call():
    calls = []
    rows = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = alternate(rows, 3, CPU, reset=lambda: calls.append("-"))
    assert calls == list("-a-b-c") * 4  # one round to warm up
    assert list(times) == ["a", "b", "c"]
    assert all(t.wall.shape == t.cpu.shape == (3,) for t in times.values())


def test_the_clock_runs_during_the_call_alone(monkeypatch):
    """With a clock that the functions themselves move, CPU time at a quarter of it."""
    now = [0.0]

    def moves(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    fake = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 4)
    monkeypatch.setattr(timing, "time", fake)
    times = alternate({"a": moves(2.0), "b": moves(8.0)}, 2, CPU, reset=moves(100.0))
    assert times["a"].wall.tolist() == [2, 2] and times["b"].wall.tolist() == [8, 8]
    assert times["a"].cpu.tolist() == [0.5, 0.5] and times["b"].cpu.tolist() == [2, 2]


def test_ratios_are_taken_within_a_round():
    # The machine slows down fivefold in the middle; each round agrees on 2.
    slow, fast = np.array([2.0, 2, 10, 10, 10]), np.array([1.0, 1, 5, 5, 5])
    assert ratio(slow, fast) == 2
    summary = Times(np.array([1.0, 3, 2]), np.zeros(3)).summary()
    assert summary["median_ms"] == 2000 and summary["rounds_ms"] == [1000, 3000, 2000]
    assert (summary["p10_ms"], summary["p90_ms"]) == pytest.approx((1200, 2800))


def times_of(wall, cpu=None):
    return Times(np.array(wall), np.array(wall if cpu is None else cpu))


def test_noise_names_each_reason(monkeypatch):
    monkeypatch.setattr(timing, "available_cores", lambda: 2)
    quiet = {"a": times_of([1.0, 1.01, 1.02])}
    assert noise(quiet, 0.1, threads=2) == noise(quiet, None, threads=2) == []
    assert noise(quiet, 1.5, threads=1) == ["load 1.50 left 0.5 cores for 1 threads"]
    spread = {**quiet, "b": times_of([1.0] * 8 + [2.0] * 2)}
    assert noise(spread, 0.0, 1) == ["p90 is up to 2.00 x median (b)"]
    waiting = {**quiet, "b": times_of([1.0] * 3, cpu=[0.5] * 3)}
    assert noise(waiting, 0.0, 1) == ["on a CPU for only 50% of the time (b)"]
    assert noise(waiting, 0.0, 1, on_cpu=False) == []


def test_machine_says_what_a_figure_depends_on():
    machine = describe_machine(CPU)
    assert machine["cpu"] and machine["available_cores"] >= 1
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "gpu" not in machine
