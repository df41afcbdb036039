"""Are the numbers of a GPU right? Its results against the definitions in float64 on the CPU."""

import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..config import get_fgd_cfg
from ..distillation.needs import wants_regions
from ..errors import in_one_line
from ..methods.fgd.method import terms_function
from ..methods.fgd.terms import GlobalContext, composed_terms
from ..methods.method import METHOD_REGISTRY
from ..timing import full_float32
from .gpu_pairs import Settings, small_batch, small_pair
from .gpu_report import Row, note, row
from .workload import build_workload

# Relative errors, in the Euclidean norm: of the terms, and of a gradient in the map's own dtype.
_TERMS = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-4, "bfloat16": 1e-4}
_GRADIENT = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3}
_METHOD_LOSS, _METHOD_GRADIENT = 1e-3, 1e-2  # through two whole networks, of kinks and thresholds


class Case(NamedTuple):
    """A pair of maps (N, C, H, W)."""

    shape: Tuple[int, int, int, int]
    dtype: str = "float32"
    channels_last: bool = False

    def __str__(self) -> str:
        layout = ", channels last" if self.channels_last else ""
        return f"{'x'.join(map(str, self.shape))} {self.dtype}{layout}"


_TINY = [Case((2, 6, 7, 10)), Case((2, 6, 7, 10), "bfloat16", True), Case((1, 6, 7, 10), "float64")]
_FULL = [
    *(Case((2, 256, 100, 168), name) for name in ("float32", "float16", "bfloat16")),
    Case((2, 256, 50, 84), "float32", True),
    Case((2, 256, 50, 84), "float16", True),
    Case((3, 300, 7, 11)),  # more channels than a tile of the kernels, odd numbers of cells
    Case((2, 256, 7, 11), "float16"),
    Case((2, 48, 13, 17), "float64"),
    Case((1, 2, 1, 1)),
]


class _Inputs(NamedTuple):
    maps: List[Tensor]  # student, teacher
    weights: List[Tensor]  # foreground, background, of the cells
    contexts: List[nn.Module]

    def to(self, device: torch.device, dtype: torch.dtype, small: torch.dtype) -> "_Inputs":
        """Maps of ``dtype``, everything else of ``small``."""
        contexts = [GlobalContext(self.maps[0].shape[1]) for _ in self.contexts]
        for copy, own in zip(contexts, self.contexts, strict=True):
            copy.load_state_dict(own.state_dict())
        return _Inputs(
            [x.to(device, dtype) for x in self.maps],
            [x.to(device, small) for x in self.weights],
            [x.to(device, small) for x in contexts],
        )


def _draw(case: Case) -> _Inputs:
    """On the CPU: maps in the case's dtype and layout, the rest in float32."""
    generator = torch.Generator().manual_seed(0)
    n, channels, height, width = case.shape
    order = torch.channels_last if case.channels_last else torch.contiguous_format
    maps = [torch.randn(case.shape, generator=generator) for _ in range(2)]
    maps[0][:, -1] += 3  # far from 0, so that squares about a mean must not cancel
    maps = [x.to(getattr(torch, case.dtype), memory_format=order) for x in maps]
    weights = [torch.rand(n, height, width, generator=generator) for _ in range(2)]
    weights[0][:, ::2] = 0
    contexts = [GlobalContext(channels) for _ in range(2)]
    with torch.no_grad():
        for parameter in (p for context in contexts for p in context.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return _Inputs(maps, weights, contexts)


class _Found(NamedTuple):
    terms: Tensor  # (4,)
    student: Tensor  # gradient of the student's map
    parameters: Tensor  # of both contexts, one after the other


def _find(terms: Callable[..., Dict[str, Tensor]], inputs: _Inputs, scales: Tensor) -> _Found:
    """Terms, and gradients of their sum weighted by ``scales``."""
    student, teacher = inputs.maps
    leaf = student.detach().requires_grad_()
    values = terms(leaf, teacher, *inputs.weights, *inputs.contexts, 0.5)
    found = torch.stack(list(values.values()))
    leaves = [leaf, *(p for context in inputs.contexts for p in context.parameters())]
    of_map, *rest = torch.autograd.grad((found * scales.to(found)).sum(), leaves)
    return _Found(found.detach(), of_map, torch.cat([x.flatten() for x in rest]))


def _exact(inputs: _Inputs) -> Tuple[_Found, Tensor]:
    """By the definition in float64, and scales under which each term counts and half precision
    holds the gradient: its root mean square is 1."""
    double = inputs.to(torch.device("cpu"), torch.float64, torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    scales = 1 / _find(composed_terms, double, ones).terms.clamp(min=1e-9)
    found = _find(composed_terms, double, scales)
    scales = scales / found.student.square().mean().sqrt()
    return _find(composed_terms, double, scales), scales


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """In the Euclidean norm."""
    exact = exact.double().cpu()
    return float((actual.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-300))


@full_float32
def measure_kernels(settings: Settings, implementation: str) -> Dict[str, Any]:
    """FGD's fused terms and their gradients against the definition, by case.

    Args:
        implementation: of MODEL.DISTILLER.FGD.IMPLEMENTATION.
    """
    device, rows = torch.device(settings.device), []
    for case in _TINY if settings.tiny else _FULL:
        inputs = _draw(case)
        exact, scales = _exact(inputs)
        small = torch.float64 if case.dtype == "float64" else torch.float32
        own = inputs.to(device, getattr(torch, case.dtype), small)
        try:
            rows += _compare(implementation, case, own, exact, scales)
        except Exception as error:  # of a kernel: the rows of the other cases are kept
            rows.append(note(str(case), in_one_line(error, 300), met=False, must=True))
    return {"rows": rows}


def _compare(name: str, case: Case, own: _Inputs, exact: _Found, scales: Tensor) -> List[Row]:
    first, second = (_find(terms_function(name), own, scales) for _ in range(2))
    errors = {
        field: relative_error(value, getattr(exact, field))
        for field, value in first._asdict().items()
    }
    equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    apart = (first.terms.double().cpu() - exact.terms).abs() / exact.terms.abs().clamp(min=1e-9)
    where = str(case)
    return [
        row(f"{where}: terms", float(apart.max()), _TERMS[case.dtype], must=True),
        row(f"{where}: map's gradient", errors["student"], _GRADIENT[case.dtype], must=True),
        row(f"{where}: parameters' gradient", errors["parameters"], _TERMS[case.dtype], must=True),
        note(f"{where}: twice the same bits", "yes" if equal else "no"),
    ]


def methods_by_pyramid() -> Dict[str, List[str]]:
    """Each method of the project with a pair that has what it needs; FGD with both."""
    found: Dict[str, List[str]] = {"retinanet": [], "rcnn": ["FGD"]}
    cfg = get_fgd_cfg()
    for name, method in METHOD_REGISTRY:
        if method.__module__.startswith("fgd."):
            needs = method.needs_of(method.node(cfg))
            found["rcnn" if wants_regions(needs) else "retinanet"].append(name)
    return found


@full_float32
def measure_methods(settings: Settings) -> Dict[str, Any]:
    """Each method's loss and the student's gradient in float32, against float64 on the CPU."""
    rows: List[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for pyramid, methods in methods_by_pyramid().items():
            rows += _methods_of(pyramid, methods, settings.device, Path(folder))
    return {"rows": rows}


def _methods_of(pyramid: str, methods: List[str], device: str, folder: Path) -> List[Row]:
    cfg = small_pair(pyramid, "cpu", folder)
    batch, works = small_batch(cfg), []
    for kind in ("cpu", device):
        cfg.MODEL.DEVICE = kind
        works.append(build_workload(cfg, (64, 96), 2, 3, methods, variants=False))
    rows = []
    for name in methods:
        exact, own = (work.distillers[name] for work in works)
        own.load_state_dict(exact.state_dict())
        _to_double(exact)
        found, proposals = _losses(own, batch)
        wanted, _ = _losses(exact, batch, proposals)
        errors = [relative_error(*pair) for pair in zip(found, wanted, strict=True)]
        where = f"{name}, {pyramid}"
        rows.append(row(f"{where}: loss", errors[0], _METHOD_LOSS, must=True))
        rows.append(row(f"{where}: student's gradient", errors[1], _METHOD_GRADIENT, must=True))
    return rows


def _to_double(distiller: nn.Module) -> None:
    distiller.double()
    teacher = distiller.teacher
    if teacher is not None:
        for part in teacher.parts.values():
            part.double()
        for name in ("pixel_mean", "pixel_std"):
            setattr(teacher, name, getattr(teacher, name).double())


def _losses(
    distiller: nn.Module, batch: List[dict], proposals: Optional[list] = None
) -> Tuple[Tuple[Tensor, Tensor], list]:
    """The method's terms and the gradient of their sum by the student's backbone; the proposals
    that the student's second stage was given.

    Args:
        proposals: to be given to it, instead of those that it finds and samples: each device draws
            its own random numbers, and Detectron2 finds none in float64.
    """
    student, kept = distiller.student, []
    if hasattr(student, "roi_heads"):
        heads = student.roi_heads
        sample = heads.label_and_sample_proposals
        if proposals is None:
            heads.label_and_sample_proposals = lambda *args: kept.extend(sample(*args)) or kept
        else:
            given = [x.to(distiller.device) for x in proposals]
            student.proposal_generator.predict_proposals = lambda *_: None
            heads.label_and_sample_proposals = lambda *_: given
    distiller.zero_grad()
    with EventStorage():
        losses = distiller(batch)
    terms = torch.stack([losses[name] for name in distiller.distillation.loss_names])
    terms.sum().backward()
    gradients = [p.grad for p in student.backbone.parameters() if p.grad is not None]
    return (terms.detach(), torch.cat([x.flatten() for x in gradients])), kept
