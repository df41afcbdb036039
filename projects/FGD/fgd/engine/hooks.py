"""Training hooks of the project."""

from detectron2.engine import HookBase

from .. import compat


class LogLevelTotals(HookBase):
    """Logs the factor of the schedule, and each level's total times it as ``fgd/p3`` and so on.

    After the step, when Detectron2 has waited for the losses anyway: the loss itself never makes
    the host wait for a GPU. A plain detector logs nothing; while the factor is 0 there are no
    totals.
    """

    def after_step(self):
        model = compat.unwrap(self.trainer.model)
        if getattr(model, "distillation", None) is None:
            return
        totals = {f"fgd/{k}": v.item() for k, v in model.distillation.level_totals.items()}
        values = {name: total * model.factor for name, total in totals.items()}
        storage = self.trainer.storage
        storage.put_scalars(**values)
        # As it is, not the median of the last iterations.
        storage.put_scalar("distillation_factor", model.factor, smoothing_hint=False)
