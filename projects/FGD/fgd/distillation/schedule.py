"""How much distillation counts in each iteration: a pure function, so that resuming is exact."""

from typing import NamedTuple, Optional

from detectron2.config import CfgNode

from ..errors import UserError

DECAYS = ("none", "linear")


class Schedule(NamedTuple):
    """Common factor on all distillation terms.

    0 before ``start``, then up to ``factor`` in ``warmup`` equal steps, 0 again from ``stop`` on.
    With ``decay_end`` it falls linearly from the end of the warm-up to 0 in that iteration.

    Iterations are counted from 0, as in Detectron2's logs.
    """

    factor: float = 1.0
    start: int = 0
    stop: Optional[int] = None  # None: never
    warmup: int = 0
    decay_end: Optional[int] = None  # None: no decay

    def value(self, iteration: int) -> float:
        """The factor of one iteration."""
        since = iteration - self.start
        if since < 0 or self.stop is not None and iteration >= self.stop:
            return 0.0
        if since < self.warmup:
            return self.factor * (since + 1) / self.warmup
        if self.decay_end is None:
            return self.factor
        left = (self.decay_end - iteration) / (self.decay_end - self.start - self.warmup)
        return self.factor * max(left, 0.0)

    def describe(self) -> str:
        """For the log: "factor 1.0, from iteration 0 on"."""
        text = f"factor {self.factor}, from iteration {self.start} "
        text += "on" if self.stop is None else f"to {self.stop - 1}"
        if self.warmup:
            text += f", warm-up {self.warmup}"
        return text if self.decay_end is None else f"{text}, linear decay to {self.decay_end}"


ALWAYS = Schedule()


def schedule_from_config(cfg: CfgNode) -> Schedule:
    """MODEL.DISTILLER.FACTOR and .SCHEDULE as a function.

    Raises:
        UserError: a value is out of its range, or the training ends before the warm-up does.
    """
    key, node = "MODEL.DISTILLER.SCHEDULE", cfg.MODEL.DISTILLER.SCHEDULE
    factor = cfg.MODEL.DISTILLER.FACTOR
    if not 0 <= factor < float("inf"):
        raise UserError(f"MODEL.DISTILLER.FACTOR: {factor} is not a finite factor >= 0")
    for name in ("START", "STOP", "WARMUP_ITERS"):
        if node[name] < 0:
            raise UserError(f"{key}.{name}: {node[name]} is not a number of iterations >= 0")
    if node.DECAY not in DECAYS:
        raise UserError(f"{key}.DECAY: {node.DECAY!r} is not one of {', '.join(DECAYS)}")
    ends = {"SOLVER.MAX_ITER": cfg.SOLVER.MAX_ITER, f"{key}.STOP": node.STOP or float("inf")}
    first = min(ends, key=ends.get)
    if 0 < node.START + node.WARMUP_ITERS >= ends[first]:
        raise UserError(
            f"{key}: START {node.START} and WARMUP_ITERS {node.WARMUP_ITERS} leave no iteration "
            f"at the full factor before {first} {ends[first]}"
        )
    decay_end = (node.STOP or cfg.SOLVER.MAX_ITER) if node.DECAY == "linear" else None
    return Schedule(factor, node.START, node.STOP or None, node.WARMUP_ITERS, decay_end)
