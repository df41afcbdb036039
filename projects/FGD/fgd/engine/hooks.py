"""Training hooks of the project."""

import logging
from contextlib import contextmanager
from typing import Iterator

from detectron2.engine import HookBase, hooks

from .. import compat
from ..errors import UserError
from .checkpoint import TrainingCheckpointer

logger = logging.getLogger(__name__)


class LogLevelTotals(HookBase):
    """Logs the factor of the step, and each level's total times it as ``distill/p3`` and so on.

    After the step, when Detectron2 has waited for the losses anyway: the loss itself never makes
    the host wait for a GPU. A plain detector logs nothing; while the factor is 0 there are no
    totals.
    """

    def after_step(self):
        model = compat.unwrap(self.trainer.model)
        if getattr(model, "distillation", None) is None:
            return
        totals = {name: sum(terms.values()).item() for name, terms in model.table.items()}
        storage = self.trainer.storage
        storage.put_scalars(**{f"distill/{k}": v * model.factor for k, v in totals.items()})
        # As it is, not the median of the last iterations.
        storage.put_scalar("distillation_factor", model.factor, smoothing_hint=False)


class SavePeriodically(hooks.PeriodicCheckpointer):
    """Detectron2's hook; with ``ignore_errors`` only a failure at the end stops the training."""

    def __init__(self, checkpointer: TrainingCheckpointer, period: int, *, ignore_errors: bool):
        super().__init__(checkpointer, period)
        self.ignore_errors = ignore_errors

    def step(self, iteration: int, **kwargs) -> None:
        with unsaved(ignored=self.ignore_errors and iteration < self.max_iter - 1):
            super().step(iteration, **kwargs)


@contextmanager
def unsaved(*, ignored: bool) -> Iterator[None]:
    """Inside, a checkpoint is written; whether it is only said in the log if it cannot be."""
    try:
        yield
    except UserError as error:
        if not ignored:
            raise
        logger.warning(f"SOLVER.IGNORE_SAVE_ERRORS: training goes on, UNSAVED. {error}")
