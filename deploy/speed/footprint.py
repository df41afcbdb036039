"""Loading a contender: here, or in a process of its own to measure load time and peak memory."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Dict, Sequence

import numpy as np

from deploy import runtime
from deploy.serving import time_limit
from deploy.speed.bench_rows import GRAPH, LEGACY, Contender, GraphRunner, LegacyRunner, Runner
from deploy.speed.timing import peak_memory


def load(contender: Contender, provider: str, threads: int) -> Runner:
    """Raises UserError, or whatever PyTorch raises where it cannot run this kind."""
    if contender.kind == GRAPH:
        options = {"providers": [provider], "threads": threads}
        return GraphRunner(runtime.load(contender.path, contender.engine, **options))
    if contender.kind == LEGACY:
        return LegacyRunner(contender.path, contender.spec, provider, threads)
    from deploy.speed.baselines import load_baseline  # imports PyTorch

    return load_baseline(contender.kind, contender.path, contender.spec, provider, threads)


def measure_alone(
    contender: Contender, provider: str, threads: int, images: Sequence[np.ndarray]
) -> Dict[str, Any]:
    """Load a contender in a new process and run it once on all images as one batch.

    Args:
        images: (H, W, 3) uint8 BGR; no more of them are used than it takes in one call.
    Returns:
        "load_seconds" without importing libraries; "first_seconds", the first call, in which
        torch.compile compiles; "peak_mib" of the whole process and "libraries_mib", its peak before
        anything was loaded (both None outside Linux). Or only "error", the reason why it cannot be
        loaded or run.
    """
    # spawned, not forked: a fork would start with our memory and with PyTorch's locks
    spawn, limit = multiprocessing.get_context("spawn"), (time_limit.time_limit(),)
    with ProcessPoolExecutor(1, spawn, time_limit.limit_time, limit) as pool:
        try:
            return pool.submit(_measure, contender, provider, threads, list(images)).result()
        except BrokenProcessPool:
            return {"error": "its process was killed, most likely for want of memory"}


def _measure(contender, provider, threads, images) -> Dict[str, Any]:
    try:
        return _load_and_run(contender, provider, threads, images)
    except Exception as error:  # of any library, and not each can be sent to another process
        return {"error": reason(error)}


def reason(error: BaseException) -> str:
    """The first line of what went wrong, or the exception's name if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _load_and_run(contender, provider, threads, images) -> Dict[str, Any]:
    # what it takes to import is not part of loading
    if contender.kind in (GRAPH, LEGACY):
        runtime.session_class(contender.engine)
    else:
        import deploy.speed.baselines  # noqa: F401
    libraries, start = peak_memory(), time.perf_counter()
    runner = load(contender, provider, threads)
    loaded = time.perf_counter()
    call = runner.call(images[: runner.max_batch])
    called = time.perf_counter()
    call()
    finished, peak = time.perf_counter(), peak_memory()
    return {
        "load_seconds": loaded - start,
        "first_seconds": finished - called,
        "peak_mib": peak and peak / 2**20,
        "libraries_mib": libraries and libraries / 2**20,
    }
