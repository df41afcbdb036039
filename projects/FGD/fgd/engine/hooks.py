"""Training hooks of the project."""

from detectron2.engine import HookBase

from .. import compat


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
