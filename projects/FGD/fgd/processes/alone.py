"""A function in a process of its own, under allocator settings that only a start can set."""

import os
import platform
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, Callable, Dict, Optional, Tuple

MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# By default glibc gives large buffers back to the system, and each new one is paid for page by
# page. With its thresholds raised it keeps them, as allocators made for such programs do.
ALLOCATORS: Dict[str, Dict[str, str]] = {
    "default": {},
    "kept": {name: str(2**34) for name in MALLOC},  # 16 GiB, in bytes
}
# The memory profiler warns on stderr of blocks older than itself, and where no GPU driver is.
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5"}


def allocators(device: str) -> Tuple[str, ...]:
    """Those of `ALLOCATORS` that can make a difference to work on this device."""
    glibc = platform.libc_ver()[0] == "glibc"
    return tuple(ALLOCATORS) if device == "cpu" and glibc else ("default",)


def run_alone(
    function: Callable[..., Any],
    *args: Any,
    allocator: str = "default",
    limit: Optional[float] = None,
) -> Any:
    """The result of a function of a module, or its exception, from a fresh process.

    Args:
        function, args: can be pickled, as can the result.
        allocator: in `ALLOCATORS`; settings of the caller's environment do not count.
        limit: seconds after which the process is killed, as it is on KeyboardInterrupt.
    Raises:
        concurrent.futures.TimeoutError: it was.
    """
    others = set(active_children())
    # Spawned, not forked: malloc reads its environment when a program starts.
    with _environment({**ALLOCATORS[allocator], **_QUIET}, without=MALLOC):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                return pool.submit(function, *args).result(limit)
            except (TimeoutError, KeyboardInterrupt):
                for child in set(active_children()) - others:
                    child.kill()
                raise


@contextmanager
def _environment(variables: Dict[str, str], without: Tuple[str, ...]):
    before = dict(os.environ)
    for name in without:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in {*variables, *without}:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)
