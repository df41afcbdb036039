"""Time and memory of the FGD loss, forward and backward, in each of its implementations."""

from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..methods.batch import Batch, Level
from ..methods.fgd.method import FGD, terms_function
from ..methods.fgd.terms import Weights
from ..methods.method import over_levels
from ..processes.alone import allocators, run_alone
from ..timing import Times, alternate, full_float32, noise, ratio
from .cases import PYRAMIDS, Maps, draw_boxes, draw_maps, levels_of
from .memory import trace_halves
from .per_box import PerBoxFGD

BASELINE = "per box"
Builder = Callable[[Sequence[Level], Weights, float], nn.Module]
COPIED_BYTES = 2**28  # far beyond any cache
_COPY = "copy"
_TOLERANCE = 1e-3  # relative, float32 sums over millions of cells


def implementations(device: str) -> Dict[str, Builder]:
    """What is compared, by name: modules called as `FGD` is, with the same parameter names.

    The baseline, then values of MODEL.DISTILLER.FGD.IMPLEMENTATION.
    """

    def ours(name: str) -> Builder:
        return lambda *args: FGD(*args, mask_reference="padded", terms=terms_function(name))

    names = ["composed", "torch"]
    if device.startswith("cuda") and find_spec("triton"):
        names.append("triton")
    return {BASELINE: PerBoxFGD, **{name: ours(name) for name in names}}


@dataclass(frozen=True)
class Settings:
    """One measurement: ``size`` (height, width) in pixels, ``boxes`` per image.

    ``only``: what is compared with the baseline, () for all that there is.
    """

    pyramid: str = "retinanet"
    size: Tuple[int, int] = (800, 1216)
    batch: int = 2
    channels: int = 256
    boxes: Tuple[int, ...] = (1, 10, 50, 300)
    rounds: int = 10
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    only: Tuple[str, ...] = ()


def measure_all(
    settings: Settings, pyramids: Sequence[str] = tuple(PYRAMIDS), load: Optional[float] = None
) -> Iterator[Dict[str, Any]]:
    """Yield the run of each pyramid under each allocator setting, from a process of its own."""
    for pyramid in pyramids:
        for allocator in allocators(settings.device):
            task = replace(settings, pyramid=pyramid)
            run = run_alone(measure, task, load, allocator=allocator)
            yield {"allocator": allocator, **run}


@full_float32
def measure(settings: Settings, load: Optional[float] = None) -> Dict[str, Any]:
    """One run: memory of each implementation and number of boxes, then their times, alternated.

    A call is masks, forward pass, backward pass to the student's maps and all parameters. Besides
    one row per call there is "copy_gb_per_s" of a plain copy, reading and writing counted, and
    "floor_ms": 5 U at that rate (read both maps, read both and write the gradient).
    """
    torch.set_num_threads(settings.threads)
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    shape = settings.size, settings.batch, settings.channels
    maps = draw_maps(settings.pyramid, *shape, dtype, device)
    methods = build(settings, device)
    boxes = {n: [b.to(device) for b in draw_boxes(n, *shape[:2], seed=n)] for n in settings.boxes}
    calls = {
        (name, n): Call(method, maps, boxes[n], settings.size)
        for n in settings.boxes
        for name, method in methods.items()
    }
    difference = check_agreement(list(methods), calls, max(settings.boxes))
    memory = {}
    for key, call in calls.items():
        call.reset()
        memory[key] = trace_halves(call.forward, call.backward, device)
        call.reset()
    rows = {_label(key): call for key, call in calls.items()}
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    rows[_COPY] = lambda: target.copy_(source)
    times = alternate(rows, settings.rounds, device, lambda: [c.reset() for c in calls.values()])
    copied = 2 * COPIED_BYTES
    floor = times[_COPY].wall * 5 * maps.bytes / copied
    return {
        "settings": asdict(settings),
        "unit_bytes": maps.bytes,
        "copy_gb_per_s": ratio(copied / 1e9, times[_COPY].wall),
        "floor_ms": 1e3 * ratio(floor, 1.0),
        "difference": difference,
        "rows": [_row(key, times, memory[key], maps.bytes, floor, settings) for key in calls],
        "noise": noise(times, load, settings.threads, on_cpu=device.type == "cpu"),
    }


def build(settings: Settings, device: torch.device) -> Dict[str, nn.Module]:
    """Every implementation with the same parameters, away from their start as identity."""
    levels = levels_of(settings.pyramid, settings.channels)
    dtype = torch.promote_types(getattr(torch, settings.dtype), torch.float32)
    torch.manual_seed(0)
    methods = {
        name: builder(levels, Weights(1e-3, 5e-4, 5e-4, 5e-6), 0.5).to(device, dtype)
        for name, builder in implementations(settings.device).items()
        if not settings.only or name in (BASELINE, *settings.only)
    }
    first = next(iter(methods.values()))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    for method in methods.values():
        method.load_state_dict(first.state_dict())
    return methods


class Call:
    """Forward and backward pass of one implementation on one batch."""

    def __init__(self, method: nn.Module, maps: Maps, boxes: List[Tensor], size: Tuple[int, int]):
        self.method, self.maps = method, maps
        instances = [Instances(size, gt_boxes=Boxes(x)) for x in boxes]
        self.batch = Batch(*maps, instances, [size] * len(boxes), size)

    def reset(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.maps.student.values(), *self.method.parameters()):
            tensor.grad = None

    def forward(self) -> Dict[str, Tensor]:
        return over_levels(self.method(self.batch))

    def backward(self, losses: Dict[str, Tensor]) -> None:
        sum(losses.values()).backward()

    def __call__(self) -> None:
        self.backward(self.forward())


def check_agreement(names: List[str], calls: Dict[tuple, Call], boxes: int) -> float:
    """Largest relative difference from the baseline, in terms and student gradients.

    Raises:
        RuntimeError: it exceeds 1e-3; a wrong loss may be as fast as it likes.
    """

    def results(name: str) -> List[Tensor]:
        call = calls[name, boxes]
        call.reset()
        losses = call.forward()
        call.backward(losses)
        gradients = [tensor.grad for tensor in call.maps.student.values()]
        call.reset()
        return [*(losses[key].detach() for key in sorted(losses)), *gradients]

    wanted, worst = results(names[0]), 0.0
    for name in names[1:]:
        for actual, exact in zip(results(name), wanted, strict=True):
            actual, exact = actual.double(), exact.double()
            difference = ((actual - exact).norm() / exact.norm().clamp(min=1e-300)).item()
            if not difference <= _TOLERANCE:
                raise RuntimeError(f"{name!r} differs from {names[0]!r} by {difference:.1e}")
            worst = max(worst, difference)
    return worst


def _label(key: Tuple[str, int]) -> str:
    return f"{key[0]}, {key[1]} boxes"


def _row(
    key: Tuple[str, int], times: Dict[str, Times], memory, unit: int, floor, settings: Settings
) -> Dict[str, Any]:
    name, boxes = key
    own, baseline, fewest = (
        times[_label(k)].wall for k in (key, (BASELINE, boxes), (name, min(settings.boxes)))
    )
    return {
        "implementation": name,
        "boxes": boxes,
        **times[_label(key)].summary(),
        "speedup": ratio(baseline, own),
        "over_fewest": ratio(own, fewest),
        "over_floor": ratio(own, floor),
        "peak_u": memory.peak / unit,
        "held_u": memory.held / unit,
    }
