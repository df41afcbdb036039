"""Training hooks of the project."""

from detectron2.engine import HookBase

from . import compat


class LogLevelTotals(HookBase):
    """Puts the weighted total of every distilled level into the logs, as ``fgd/p3`` and so on.

    After the step, when Detectron2 has waited for the losses anyway: the loss itself never makes
    the host wait for a GPU. A plain detector logs nothing.
    """

    def after_step(self):
        distillation = getattr(compat.unwrap(self.trainer.model), "distillation", None)
        totals = getattr(distillation, "level_totals", {})
        self.trainer.storage.put_scalars(**{f"fgd/{k}": v.item() for k, v in totals.items()})
