"""Bytes that a piece of work allocates, counted over time: exact, unlike the process's size."""

from typing import Any, Callable, Dict, Iterator, NamedTuple, Tuple

import torch
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile


class Bytes(NamedTuple):
    """Beyond what was allocated before: the most at any moment, and what is left at the end."""

    peak: int
    held: int


def trace(work: Callable[[], Any], device: torch.device) -> Tuple[Any, Bytes]:
    """Run ``work`` once and return its result and the bytes of it.

    On CUDA the caching allocator counts. On a CPU every allocation and release of PyTorch's
    allocator is recorded; releases of what was there before count as nothing. Not seen there: what
    worker threads allocate by themselves, and buffers inside math libraries.
    """
    return _tracer(device)(work)


def trace_halves(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device
) -> Bytes:
    """Of a forward pass whose result goes into ``backward``: peak over both, held between them."""
    tracer = _tracer(device)
    result, (peak, held) = tracer(forward)
    _, total = tracer(lambda: backward(result))
    return Bytes(max(peak, total.peak), held)


def _tracer(device: torch.device) -> Callable[[Callable[[], Any]], Tuple[Any, Bytes]]:
    return _CudaTracer(device) if device.type == "cuda" else _CpuTracer()


class _CpuTracer:
    """Each call runs a function and returns its result and the bytes since the first call."""

    def __init__(self):
        self.live: Dict[int, int] = {}  # address → bytes, of what was allocated here
        self.held = self.peak = 0

    def __call__(self, work: Callable[[], Any]) -> Tuple[Any, Bytes]:
        with profile(profile_memory=True) as recorder:
            result = work()
        roots = recorder.kineto_results.experimental_event_tree()
        allocations = (e for e in _flat(roots) if e.tag == _EventType.Allocation)
        # Sorting is stable: equal times keep their order.
        for event in sorted(allocations, key=lambda e: e.start_time_ns):
            self._count(event.extra_fields.ptr, event.extra_fields.alloc_size)
        return result, Bytes(self.peak, self.held)

    def _count(self, address: int, size: int) -> None:
        if size > 0:
            self.live[address] = size
        else:
            # The size of the event is wrong where an address was used before: take our own.
            size = -self.live.pop(address, 0)
        self.held += size
        self.peak = max(self.peak, self.held)


def _flat(events) -> Iterator:
    for event in events:
        yield event
        yield from _flat(event.children)


class _CudaTracer:
    """As `_CpuTracer`, by the statistics of the caching allocator."""

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def __call__(self, work: Callable[[], Any]) -> Tuple[Any, Bytes]:
        result = work()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - self.before
        return result, Bytes(peak, torch.cuda.memory_allocated(self.device) - self.before)
