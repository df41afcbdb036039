"""MODEL.DISTILLER.ADAPT: a weight of distillation that follows the share of gradient it causes.

The gradient-guided adaptive modulation (GAM) of RT-DETRv4 (arXiv 2510.25257), for any method. With
g the gradient of all losses together, p is the share that falls to the layers which distillation
feeds, in percent and averaged over the steps of a period (an epoch):

    p = 100 · sum of |g| over the parameters of these layers / sum of |g| over all that is trained

and between periods the multiplier m of all distillation terms is changed by `adapted`.

As in the authors' code, which we follow, but for: every rank measures, where theirs has the main
process alone; steps whose gradients are not finite are left out, there they count as 0; and there
is no last phase without strong augmentation in which the default applies.
"""

import logging
from typing import Dict, List, NamedTuple, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from .. import compat
from ..config import META_ARCHITECTURE
from ..errors import UserError

KEY = "MODEL.DISTILLER.ADAPT"
_NOTHING = 1e-6  # percent: distillation feeds nothing that is trained
_BODY = "backbone.bottom_up."

logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """Target ± band, in percent; limits of one change; the multiplier where nothing is fed."""

    target: float = 11.0
    band: float = 1.0
    least: float = 0.1
    most: float = 10.0
    default: float = 1.0


def adapted(multiplier: float, share: float, rule: Rule) -> float:
    """The multiplier of the next period.

    Unchanged in [target - band, target + band]. Outside, with the share p and the bound t on the
    other side of the band as fractions, m · t (1 - p) / (p (1 - t)): were all of the layers'
    gradient distillation's, the share would become t. That is changed by a factor from
    ``least`` to ``most``, no more.

    Args:
        share: in percent, 0 to 100.
    """
    if share < _NOTHING:
        return rule.default
    low, high = rule.target - rule.band, rule.target + rule.band
    if low <= share <= high:
        return multiplier
    p, t = share / 100, (high if share < low else low) / 100
    ratio = t * (1 - p) / (p * (1 - t)) if t < 1 else rule.most
    return multiplier * min(max(ratio, rule.least), rule.most)


def add_adaptive_config(cfg: CfgNode) -> None:
    """Add MODEL.DISTILLER.ADAPT, in place."""
    node = cfg.MODEL.DISTILLER.ADAPT = type(cfg)()
    node.ENABLED = False
    # The share of the gradient to be held, in percent, and how far it may be off. They belong to
    # the layers: the authors have 11 ± 1 for their smallest student and 2 ± 0.1 for a large one,
    # in one layer of an encoder. A bottom-up network has far more by the detection losses alone,
    # and no weight brings it below that: 50 ± 50 measures and changes nothing.
    node.TARGET = 11.0
    node.BAND = 1.0
    # The layers, as prefixes of names in the student, for example ["backbone.bottom_up.res5"]. [] =
    # the neck for levels of the pyramid and for regions, the bottom-up network for its stages.
    node.MODULES = []
    # Iterations between changes; 0 = as many as an epoch has.
    node.PERIOD = 0
    # One change multiplies the weight by no less and no more than this.
    node.LEAST = 0.1
    node.MOST = 10.0
    # The multiplier where the layers have no gradient at all.
    node.DEFAULT = 1.0


def check_adaptive(cfg: CfgNode) -> None:
    """Raise UserError for settings of MODEL.DISTILLER.ADAPT that cannot work."""
    distiller = cfg.MODEL.DISTILLER
    node = distiller.ADAPT
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE or not node.ENABLED:
        return
    if not distiller.METHOD:
        raise UserError(f'{KEY}.ENABLED: with METHOD "" there is no weight to adapt')
    if distiller.SCHEDULE.DECAY != "none":
        raise UserError(
            f"{KEY}.ENABLED: it would work against SCHEDULE.DECAY {distiller.SCHEDULE.DECAY!r}; "
            "use one of them"
        )
    if not (0 <= node.BAND <= node.TARGET and 0 < node.TARGET <= 100 - node.BAND):
        raise UserError(
            f"{KEY}: TARGET {node.TARGET} ± BAND {node.BAND} is not a band within 0 to 100 %"
        )
    if node.PERIOD < 0:
        raise UserError(f"{KEY}.PERIOD: {node.PERIOD} is not a number of iterations, or 0")
    if not 0 < node.LEAST <= 1 <= node.MOST < float("inf"):
        raise UserError(
            f"{KEY}: LEAST {node.LEAST} and MOST {node.MOST} must be above 0, finite, and have 1 "
            "between them"
        )
    if not 0 < node.DEFAULT < float("inf"):
        raise UserError(f"{KEY}.DEFAULT: {node.DEFAULT} is not a finite multiplier above 0")


def fed_parameters(distiller: nn.Module, modules: Sequence[str] = ()) -> Dict[str, nn.Parameter]:
    """The trained parameters of the student whose share is measured, by name.

    Args:
        modules: prefixes of names; () = the part of the backbone that ends in what is distilled:
            the neck for levels of the pyramid and for methods without maps, the bottom-up network
            for its stages.
    Raises:
        UserError: there are none, or none of one of ``modules``.
    """
    named = {k: p for k, p in distiller.student.named_parameters() if p.requires_grad}
    for prefix in modules:
        if not any(f"{name}.".startswith(f"{prefix}.") for name in named):
            raise UserError(f"{KEY}.MODULES: no trained parameter of the student is in {prefix!r}")
    if modules:
        prefixes = tuple(f"{prefix}." for prefix in modules)
        return {k: p for k, p in named.items() if f"{k}.".startswith(prefixes)}
    stages = [source.stage for source in (distiller.sources or {}).values()]
    wanted = {True: any(stages), False: not all(stages) or not stages}  # by: in the body
    found = {
        k: p for k, p in named.items() if k.startswith("backbone.") and wanted[k.startswith(_BODY)]
    }
    if not found:
        raise UserError(
            f"{KEY}: nothing is trained in the part of the backbone that distillation feeds; name "
            f"other layers with {KEY}.MODULES"
        )
    return found


def adaptive_hooks(cfg: CfgNode, model: nn.Module, images: int) -> List[HookBase]:
    """The hook of MODEL.DISTILLER.ADAPT; none where it is off.

    Args:
        model: what is trained, in DDP or not. images: of an epoch, on all ranks.
    """
    distiller = compat.unwrap(model)
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE or not cfg.MODEL.DISTILLER.ADAPT.ENABLED:
        return []
    node = cfg.MODEL.DISTILLER.ADAPT
    fed = fed_parameters(distiller, node.MODULES)
    period = node.PERIOD or -(-images // cfg.SOLVER.IMS_PER_BATCH)
    rule = Rule(node.TARGET, node.BAND, node.LEAST, node.MOST, node.DEFAULT)
    logger.info(
        f"Adaptive weight: {len(fed)} parameters ({next(iter(fed))}, ...) are to have "
        f"{rule.target:g} ± {rule.band:g} % of the gradient; changed every {period} iterations"
    )
    return [AdaptiveWeight(distiller, list(fed.values()), period, rule)]


class AdaptiveWeight(HookBase):
    """Measures the share after each backward pass and sets ``multiplier`` of a Distiller.

    Measured are steps at the full factor of the schedule. The gradients are those of all ranks,
    which DDP has averaged, so all ranks come to the same; before clipping; and in mixed precision
    times the loss scale, which a share does not feel. The sums stay on their device: a GPU is
    waited for once a period.

    In checkpoints, under trainer/hooks/AdaptiveWeight: "multiplier", "sums" of the period so far,
    and "changes", a list of {"iteration": of the first step with it, "share", "multiplier"}.

    Args:
        fed: parameters whose share it is. period: iterations.
    """

    def __init__(self, distiller: nn.Module, fed: Sequence[nn.Parameter], period: int, rule: Rule):
        self.distiller, self.period, self.rule = distiller, period, rule
        own = {id(p) for p in fed}
        self._fed = list(fed)
        self._rest = [p for p in distiller.parameters() if p.requires_grad and id(p) not in own]
        self.changes: List[Dict[str, float]] = []
        self._clear()

    def _clear(self, sums: Sequence[float] = (0.0, 0.0)) -> None:
        """Of shares, and how many."""
        device = self._fed[0].device
        self._sums = torch.tensor(sums, dtype=torch.float64, device=device)

    def before_train(self) -> None:
        self.trainer._trainer.watch_gradients = self.measure

    def after_train(self) -> None:
        self.trainer._trainer.watch_gradients = None

    @torch.no_grad()
    def measure(self) -> None:
        """Add the share of the gradients that are there now."""
        schedule = self.distiller.schedule
        if not 0 < schedule.value(self.trainer.iter) == schedule.factor:
            return
        fed, rest = (
            [p.grad for p in side if p.grad is not None] for side in (self._fed, self._rest)
        )
        lengths = torch.stack(torch._foreach_norm([*fed, *rest], 1)).double()
        total = lengths.sum()
        # Not after an overflow in mixed precision, which the step trainer skips.
        counts = total.isfinite() & (total > 0)
        share = torch.where(counts, 100 * lengths[: len(fed)].sum() / total, 0.0)
        self._sums += torch.stack([share, counts.double()])

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        total, count = self._sums.tolist()
        self._clear()
        if count:
            self._adapt(total / count)

    def _adapt(self, share: float) -> None:
        before, first = self.distiller.multiplier, self.trainer.iter + 1
        after = adapted(before, share, self.rule)
        self.trainer.storage.put_scalar("distillation_share", share, smoothing_hint=False)
        if after == before:
            return
        self.distiller.multiplier = after
        self.changes.append({"iteration": first, "share": share, "multiplier": after})
        logger.info(
            f"Adaptive weight: {share:.3g} % of the gradient, so from iteration {first} on "
            f"distillation counts {after:.4g} instead of {before:.4g} times"
        )

    def state_dict(self) -> dict:
        return {
            "multiplier": self.distiller.multiplier,
            "sums": self._sums.tolist(),
            "changes": [dict(x) for x in self.changes],
        }

    def load_state_dict(self, state: dict) -> None:
        self.distiller.multiplier = state["multiplier"]
        self._clear(state["sums"])
        self.changes = [dict(x) for x in state["changes"]]
