"""One optimizer step that no process takes alone: Detectron2's steps, with a check by all ranks."""

import logging
from typing import Callable, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import DivergedError
from ..processes import stop

logger = logging.getLogger(__name__)

# A loss scale starts at 2**16 and is halved at each skip: so many in a row are no search for the
# right one, the gradients are never finite.
MAX_SKIPPED = 20


class StepTogether:
    """Mixin for Detectron2's step trainers: no rank steps with a loss that is NaN or infinite.

    Detectron2 finds out on the main process only, while the others step and later wait for it. Both
    versions call ``_write_metrics`` between backward and the optimizer's step. What the ranks tell
    each other there also says whether one of them was asked to stop: `stop_signal`. There
    ``watch_gradients``, if set, finds the gradients as they are before clipping.
    """

    stop_signal = ""
    watch_gradients: Optional[Callable[[], None]] = None

    def _write_metrics(self, loss_dict, data_time, *args, **kwargs):
        images = getattr(getattr(self, "data_loader", None), "last_images", ())
        self.stop_signal = check_together(loss_dict, images)
        if self.watch_gradients is not None:
            self.watch_gradients()
        super()._write_metrics(loss_dict, data_time, *args, **kwargs)


class SkipsCounted:
    """Mixin for an AMP step: a skip for overflow is normal, `MAX_SKIPPED` in a row are not.

    The loss stays finite then, and training would go on for ever without a step. The count is that
    of the optimizer's steps, not of the loss scale, which a host would have to wait for.
    """

    skipped = 0

    def run_step(self):
        steps: List[bool] = []
        counter = self.optimizer.register_step_post_hook(lambda *_: steps.append(True))
        try:
            super().run_step()
        finally:
            counter.remove()
        self.skipped = 0 if steps else self.skipped + 1
        if self.skipped >= MAX_SKIPPED:  # the gradients, so also the count, are equal on all ranks
            raise DivergedError(
                f"mixed precision skipped {self.skipped} steps in a row: the gradients overflow at "
                f"any loss scale (now {self.grad_scaler.get_scale():.3g})"
            )


class SimpleStep(StepTogether, SimpleTrainer):
    """Detectron2's step in full precision."""


class AMPStep(SkipsCounted, StepTogether, AMPTrainer):
    """Detectron2's step in mixed precision."""


def build_step(cfg: CfgNode, model: nn.Module, data, optimizer) -> StepTogether:
    """In the precision of the config."""
    return (AMPStep if cfg.SOLVER.AMP.ENABLED else SimpleStep)(model, data, optimizer)


def check_together(loss_dict: Dict[str, Tensor], images: Sequence[str] = ()) -> str:
    """Raise on every rank if the total loss of any rank is NaN or infinite. A collective.

    Args:
        loss_dict: scalar losses of this rank. images: names of its batch, for the message.
    Returns:
        Name of the signal that asks any rank to stop, the same on all; "" without one.
    Raises:
        DivergedError: the ranks concerned, with losses and images of the first. The log of the
            main process has a table for each.
    """
    losses = {name: value.detach() for name, value in loss_dict.items()}
    finite = torch.isfinite(sum(losses.values())).item()
    reports = comm.all_gather((finite, stop.requested()))
    bad = [rank for rank, (ok, _) in enumerate(reports) if not ok]
    if bad:
        values = {name: value.item() for name, value in losses.items()}
        _raise_diverged(bad, comm.all_gather((values, list(images))))
    return next((name for _, name in reports if name), "")


def _raise_diverged(bad: List[int], details: list) -> None:
    for rank in bad:
        losses, images = details[rank]
        rows = [*(f"{name:32} {value:.4g}" for name, value in losses.items()), *images]
        logger.error("Losses and images of rank %d:\n  %s", rank, "\n  ".join(rows))
    losses, images = details[bad[0]]
    table = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    where = f" on rank {', '.join(map(str, bad))}" if len(details) > 1 else ""
    owner = f" of rank {bad[0]}" if len(details) > 1 else ""
    batch = f"; images{owner}: {', '.join(images)}" if images else ""
    raise DivergedError(f"a loss became infinite or NaN{where} ({table}){batch}")


class RunningStatistics:
    """Batch norm's averages of a model, which a forward pass changes before its loss is known.

    `keep` before a step costs two copies of a few thousand numbers; `restore` takes the bad step's
    share out again.
    """

    def __init__(self, model: nn.Module):
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
        self._buffers = [b for norm in norms for b in norm.buffers()]
        self._kept = [b.clone() for b in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)
