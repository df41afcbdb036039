"""Losses and gradients of the first batches, term by term and level by level."""

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Sequence

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from tabulate import tabulate
from torch import Tensor, nn

from ..distillation.schedule import Schedule
from ..errors import UserError
from .findings import FAULT, OK, WARNING, Finding
from .untouched import untouched

# The author's advice: each level's total comparable to the detector's losses, 0.1 to 2.
SMALLEST, LARGEST = 0.1, 2.0
COMPARABLE = 3.0  # within a factor of three is comparable

# Gradients of a half-precision step are taken of losses times this, as GradScaler would.
_SCALE = 1024.0


@dataclass
class Measured:
    """Means over batches and processes; distillation terms weighted, at MODEL.DISTILLER.FACTOR 1.

    Attributes:
        detection: the student's own losses. levels: level → term → value.
        values: each entry of the method in the loss dict, of the first batch.
        gradients: the same entries → L2 norm of the gradient in the student's backbone.
    """

    detection: Dict[str, float] = field(default_factory=dict)
    levels: Dict[str, Dict[str, float]] = field(default_factory=dict)
    values: Dict[str, float] = field(default_factory=dict)
    gradients: Dict[str, float] = field(default_factory=dict)

    def level_totals(self) -> Dict[str, float]:
        return {level: sum(terms.values()) for level, terms in self.levels.items()}


def measure(model: nn.Module, batches: Iterable[List[dict]], *, half: bool = False) -> Measured:
    """Run a Distiller on batches without training it; all processes call it together.

    Args:
        model: unwrapped. half: autocast to float16, as the training will.
    Raises:
        UserError: the method cannot work on a batch, in any process; raised by all.
    """
    measured, count = Measured(), 0
    detection, terms = defaultdict(float), defaultdict(lambda: defaultdict(float))
    with untouched(model):
        model.train()
        model.schedule = Schedule()  # the full weights, whatever iteration 0 would count
        for batch in batches:
            with torch.set_grad_enabled(count == 0):
                losses = _forward(model, batch, half)
            if count == 0:
                own = {k: losses[k] for k in model.loss_names}
                measured.values = {k: float(v.detach()) for k, v in own.items()}
                measured.gradients = _gradient_norms(own, _body(model.student), half)
            _add(detection, {k: v for k, v in losses.items() if k not in measured.values})
            for level, values in model.table.items():
                _add(terms[level], values)
            count += 1
            get_event_storage().step()  # the batches are those of the first iterations
    measured.detection = {k: v / count for k, v in detection.items()}
    measured.levels = {k: {n: v / count for n, v in x.items()} for k, x in terms.items()}
    return _over_processes(measured)


def _add(sums: Dict[str, float], values: Dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] += float(value.detach())


def _forward(model: nn.Module, batch: List[dict], half: bool) -> Dict[str, Tensor]:
    """The losses of one batch; an error of the method is raised by all processes together."""
    losses, problem = {}, ""
    try:
        with torch.autocast(model.device.type, torch.float16, enabled=half):
            losses = model(batch)
    except (UserError, ValueError) as error:
        problem = str(error)
    problems = [text for text in comm.all_gather(problem) if text]
    if problems:
        raise UserError(problems[0])
    return losses


def _body(student: nn.Module) -> List[nn.Parameter]:
    """What distillation must reach: the bottom-up network, or what of the backbone is trained."""
    backbone = student.backbone
    for module in (getattr(backbone, "bottom_up", backbone), backbone):
        parameters = [p for p in module.parameters() if p.requires_grad]
        if parameters:
            return parameters
    return []


def _gradient_norms(
    losses: Dict[str, Tensor], parameters: Sequence[nn.Parameter], half: bool
) -> Dict[str, float]:
    """L2 norm of each loss's gradient in ``parameters``; 0 where none arrives."""
    norms, scale = {}, _SCALE if half else 1.0
    for name, loss in losses.items():
        norms[name] = 0.0
        if not (loss.requires_grad and parameters):
            continue
        # Of all losses but the last one the graph is needed again.
        gradients = torch.autograd.grad(
            loss * scale, parameters, retain_graph=True, allow_unused=True
        )
        parts = [g.float().norm() for g in gradients if g is not None]
        if parts:
            norms[name] = float(torch.stack(parts).norm()) / scale
    return norms


def _over_processes(measured: Measured) -> Measured:
    """Means over processes; of gradients the largest, because one image may have no object."""
    ranks = comm.all_gather(measured)
    first, count = ranks[0], len(ranks)
    return Measured(
        {k: sum(x.detection[k] for x in ranks) / count for k in first.detection},
        {
            level: {k: sum(x.levels[level][k] for x in ranks) / count for k in terms}
            for level, terms in first.levels.items()
        },
        {k: max(x.values[k] for x in ranks) for k in first.values},
        {k: max(x.gradients[k] for x in ranks) for k in first.gradients},
    )


def check_gradients(measured: Measured) -> Finding:
    """Each term that is not 0 has a gradient in the student's backbone."""
    problems = []
    for name, norm in measured.gradients.items():
        if not norm < float("inf"):
            problems.append(f"the gradient of {name} is {norm}")
        elif measured.values[name] and not norm:
            problems.append(f"{name} is {measured.values[name]:.3g} but moves nothing there")
    norms = ", ".join(f"{name} {norm:.2g}" for name, norm in measured.gradients.items())
    found = f"L2 norms in the student's backbone: {norms}"
    if not problems:
        return Finding("gradients", OK, found)
    advice = "a feature is detached, or frozen (MODEL.BACKBONE.FREEZE_AT), before it is distilled"
    return Finding("gradients", FAULT, f"{'; '.join(problems)}. {found}", advice)


def suggested_factor(measured: Measured) -> float:
    """MODEL.DISTILLER.FACTOR that makes the mean level's total a typical detection loss.

    That is the median of the detector's losses (of an even number the lower one), brought into 0.1
    to 2 if it is outside, over the mean of the levels' totals at factor 1; two digits. Not their
    mean: an inherited classifier's loss is high at first and falls within a few steps.

    Returns:
        0.0 if every term is 0 or something is not finite: then no factor helps.
    """
    totals = measured.level_totals().values()
    total = sum(totals) / len(totals)
    if not 0 < total < float("inf") or not _typical_loss(measured) < float("inf"):
        return 0.0
    return float(f"{min(max(_typical_loss(measured), SMALLEST), LARGEST) / total:.2g}")


def _typical_loss(measured: Measured) -> float:
    values = list(measured.detection.values())
    return statistics.median_low(values) if all(x == x for x in values) else float("nan")


def check_losses(measured: Measured, factor: float, batches: int) -> Finding:
    """Whether distillation weighs neither nothing nor everything beside the detection losses.

    Args:
        factor: MODEL.DISTILLER.FACTOR. batches: how many were measured, per process.
    """
    totals = {level: factor * total for level, total in measured.level_totals().items()}
    text = ", ".join(f"{level} {total:.3g}" for level, total in totals.items())
    typical = _typical_loss(measured)
    found = (
        f"levels' totals at the start: {text}; median detection loss {typical:.3g}; batches "
        f"{batches}"
    )
    if not any(totals.values()):
        advice = "every distillation term is 0: set the method's weights and MODEL.DISTILLER.FACTOR"
        return Finding("losses", FAULT, found, advice)
    if not all(abs(x) < float("inf") for x in (*totals.values(), typical)):
        return Finding("losses", FAULT, found, "not finite: check teacher, images and boxes")
    suggestion = suggested_factor(measured)
    if 1 / COMPARABLE <= suggestion / factor <= COMPARABLE:
        same = f"{suggestion:g}" == f"{factor:g}"
        advice = "" if same else f"nothing; MODEL.DISTILLER.FACTOR {suggestion:g} (now {factor:g})"
        return Finding("losses", OK, found, advice and f"{advice} would make them equal")
    advice = f"start from MODEL.DISTILLER.FACTOR {suggestion:g} (now {factor:g}); --balance does"
    return Finding("losses", WARNING, found, advice)


def loss_table(measured: Measured, factor: float) -> str:
    """Every term of every level at ``factor``, with totals, and the detection losses below."""
    terms = list(dict.fromkeys(t for level in measured.levels.values() for t in level))
    rows = [
        [level, *(factor * values.get(term, 0.0) for term in terms), factor * sum(values.values())]
        for level, values in measured.levels.items()
    ]
    table = tabulate(rows, ["level", *terms, "total"], floatfmt=".3g")
    losses = ", ".join(f"{name} {value:.3g}" for name, value in measured.detection.items())
    return f"Distillation, weighted, at factor {factor:g}:\n{table}\nDetection: {losses}"
