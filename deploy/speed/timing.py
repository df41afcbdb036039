"""Fair timing: alternated rounds, percentiles, and a verdict on noise. numpy only."""

import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from deploy.serving.progress import show_progress

_LIBRARIES = ("numpy", "Pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "onnx", "torch")
_LIBRARIES += ("detectron2",)
_MAX_SPREAD = 1.2  # p90 / p50 on a quiet machine stays well below
_MIN_CPU_SHARE = 0.9  # process CPU time / wall time; less means waiting for others


@dataclass
class Timing:
    """Seconds of each repeat: on the clock (n,), and of CPU over all threads (n,)."""

    wall: np.ndarray
    cpu: np.ndarray

    def summary(self, images: int) -> Dict[str, float]:
        """p50, p90, p99 in ms per call of `images` images, images per second, CPU ms per call."""
        p50, p90, p99 = np.percentile(self.wall, [50, 90, 99])
        return {
            "p50_ms": 1e3 * p50,
            "p90_ms": 1e3 * p90,
            "p99_ms": 1e3 * p99,
            "images_per_second": images / p50,
            "cpu_ms": 1e3 * float(np.median(self.cpu)),
            "repeats": len(self.wall),
        }


def interleave(rows: Dict[str, Callable[[], Any]], repeats: int, warmup: int) -> Dict[str, Timing]:
    """Call each function once per round, so that a slow minute of the machine hits all of them.

    Args:
        repeats: timed rounds, at least 1.  warmup: rounds before them that do not count.
    """
    wall, cpu = ({name: np.empty(repeats) for name in rows} for _ in range(2))
    for i in range(-warmup, repeats):
        for name, call in rows.items():
            cpu_start, start = time.process_time(), time.perf_counter()
            call()
            elapsed, cpu_elapsed = time.perf_counter() - start, time.process_time() - cpu_start
            if i >= 0:
                wall[name][i], cpu[name][i] = elapsed, cpu_elapsed
        show_progress(i + warmup + 1, repeats + warmup, "rounds")
    return {name: Timing(wall[name], cpu[name]) for name in rows}


def noise(
    timings: Dict[str, Timing], load: Optional[float], threads: int, on_cpu: bool = True
) -> List[str]:
    """Reasons to distrust the figures; none on a quiet machine.

    Args:
        timings: by a name to show.  load: load average before the run, None if unknown.
        threads: threads that the run uses.
        on_cpu: False where calls wait for another device, and use little CPU time by nature.
    """
    reasons = []
    free = available_cores() - (load or 0.0)
    if free < threads - 0.25:
        reasons.append(
            f"load average {load:.2f} left {max(free, 0):.1f} cores for {threads} threads"
        )
    spreads = {n: np.percentile(t.wall, 90) / np.median(t.wall) for n, t in timings.items()}
    shares = {n: t.cpu.sum() / t.wall.sum() for n, t in timings.items()}
    worst = max(spreads, key=spreads.get)
    if spreads[worst] > _MAX_SPREAD:
        reasons.append(f"p90 is up to {spreads[worst]:.2f} x p50 ({worst})")
    worst = min(shares, key=shares.get)
    if on_cpu and shares[worst] < _MIN_CPU_SHARE:
        reasons.append(f"on a CPU for only {shares[worst]:.0%} of the time ({worst})")
    return reasons


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> Optional[float]:
    """Of the last minute; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe_machine() -> Dict[str, Any]:
    """CPU, cores, frequency governor, load, versions: what a figure means nothing without."""
    installed = {}
    for name in _LIBRARIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "available_cores": available_cores(),
        "governor": governor.read_text().strip() if governor.exists() else None,
        "load_average": load_average(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **installed},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def peak_memory() -> Optional[int]:
    """Largest resident size of this process in bytes; None where Linux's /proc is missing.

    Not `ru_maxrss`: a child inherits its parent's there.
    """
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peak) * 1024
