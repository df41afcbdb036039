"""What distillation is allowed to cost, and whether it keeps to that."""

from typing import Any, Dict, List, NamedTuple, Optional

# Stated for two images of 800x1216 pixels and 256 channels.
SPEEDUP = {"torch": 3.0, "triton": 7.0}  # over the per-box loop, at 50 boxes per image
PEAK = 1.25  # times the student's maps, the gradient itself being 1
HELD = 0.1  # times the student's maps, from forward to backward pass
MANY_BOXES = 1.15  # time with 300 boxes over that with 1
STEP = 1.05  # distillation step over student step plus teacher forward


class Goal(NamedTuple):
    """A bound on a figure; ``value`` None where the run did not measure it."""

    name: str
    bound: float
    value: Optional[float]
    at_least: bool = False

    @property
    def met(self) -> Optional[bool]:
        """None if not measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        """For people, such as "peak memory ≤ 1.25 U: 1.10, met"."""
        verdict = {None: "not measured", True: "met", False: "MISSED"}[self.met]
        value = "" if self.value is None else f"{self.value:.3g}, "
        return f"{self.name} {'≥' if self.at_least else '≤'} {self.bound:g}: {value}{verdict}"

    def json(self) -> Dict[str, Any]:
        return {**self._asdict(), "met": self.met, "line": self.line()}


def loss_goals(rows: List[Dict[str, Any]]) -> List[Goal]:
    """Goals for the rows of one run (`fgd.bench.loss.measure`), of those that are to be fast."""
    goals = []
    for name, speedup in SPEEDUP.items():
        own = {row["boxes"]: row for row in rows if row["implementation"] == name}
        if not own:
            continue
        at_50 = own[50]["speedup"] if 50 in own else None
        many = own[300]["over_fewest"] if min(own) == 1 and 300 in own else None
        goals += [
            Goal(f"{name}: times as fast as per box, 50 boxes", speedup, at_50, at_least=True),
            Goal(f"{name}: peak memory, U", PEAK, max(row["peak_u"] for row in own.values())),
            Goal(f"{name}: held for backward, U", HELD, max(row["held_u"] for row in own.values())),
            Goal(f"{name}: time with 300 boxes over 1 box", MANY_BOXES, many),
        ]
    return goals


def step_goal(over_parts: float) -> Goal:
    """Goal of the whole step; ``over_parts``: it over student step plus teacher forward."""
    return Goal("distillation step over student step + teacher forward", STEP, over_parts)
