"""Fair timing: alternated rounds, ratios within a round, a verdict on noise, the machine."""

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import numpy as np
import torch

# Decorates what compares float32 results: cuDNN's convolutions would round them to the 10 bits of
# TF32 on a GPU, which PyTorch allows by default.
full_float32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

_LIBRARIES = ("torch", "triton", "detectron2", "numpy")
_MAX_SPREAD = 1.2  # p90 / median; a quiet machine stays well below
_MIN_CPU_SHARE = 0.9  # process CPU time / wall time; less means waiting for others


class Times(NamedTuple):
    """Seconds of each round: on the clock (n,), and of CPU over all threads (n,)."""

    wall: np.ndarray
    cpu: np.ndarray

    def summary(self) -> Dict[str, Any]:
        """Median, 10th and 90th percentile in ms, and every round."""
        p10, p50, p90 = (1e3 * float(x) for x in np.percentile(self.wall, [10, 50, 90]))
        rounds = [1e3 * float(x) for x in self.wall]
        return {"median_ms": p50, "p10_ms": p10, "p90_ms": p90, "rounds_ms": rounds}


def alternate(
    rows: Dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    reset: Callable[[], Any] = lambda: None,
) -> Dict[str, Times]:
    """Call each function once per round, so that a slow minute of the machine hits all of them.

    Args:
        rounds: timed ones, at least 1; one more before them does not count.
        device: CUDA is waited for before the clock is read.
        reset: called before each call, outside the clock.
    """
    times = {name: Times(np.empty(rounds), np.empty(rounds)) for name in rows}
    for i in range(-1, rounds):
        for name, call in rows.items():
            reset()
            _wait(device)
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            _wait(device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if i >= 0:
                times[name].wall[i], times[name].cpu[i] = wall, cpu
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(over: np.ndarray, under: np.ndarray) -> float:
    """Median of the ratios within each round, which drift of the machine does not touch."""
    return float(np.median(over / under))


def noise(
    times: Dict[str, Times], load: Optional[float], threads: int, on_cpu: bool = True
) -> List[str]:
    """Reasons to distrust the figures; none on a quiet machine.

    Args:
        load: load average before the run, None if unknown. threads: that the run uses.
        on_cpu: False where the host waits for a GPU, and uses little CPU time by nature.
    """
    reasons = []
    free = available_cores() - (load or 0.0)
    if free < threads - 0.25:
        reasons.append(f"load {load:.2f} left {max(free, 0):.1f} cores for {threads} threads")
    spread = {n: float(np.percentile(t.wall, 90) / np.median(t.wall)) for n, t in times.items()}
    worst = max(spread, key=spread.get)
    if spread[worst] > _MAX_SPREAD:
        reasons.append(f"p90 is up to {spread[worst]:.2f} x median ({worst})")
    share = {n: float(t.cpu.sum() / t.wall.sum()) for n, t in times.items()}
    worst = min(share, key=share.get)
    if on_cpu and share[worst] < _MIN_CPU_SHARE:
        reasons.append(f"on a CPU for only {share[worst]:.0%} of the time ({worst})")
    return reasons


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> Optional[float]:
    """Of the last minute; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe_machine(device: torch.device) -> Dict[str, Any]:
    """Device, cores, load, versions: what a figure means nothing without."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    machine = {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "available_cores": available_cores(),
        "load_average": load_average(),
        "system": platform.platform(),
        "versions": versions,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
    return machine


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
