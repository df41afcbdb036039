"""What distillation is allowed to cost, and whether it keeps to that."""

from typing import AbstractSet, Any, Dict, List, NamedTuple, Optional

# Stated for two images of 800x1216 pixels and 256 channels.
SPEEDUP = {"torch": 3.0, "triton": 7.0}  # over the per-box loop, at 50 boxes per image
PEAK = 1.25  # times the student's maps, the gradient itself being 1
HELD = 0.1  # times the student's maps, from forward to backward pass
MANY_BOXES = 1.15  # time with 300 boxes over that with 1

# Distillation step over student step plus what the method needs of the teacher's forward.
STEP = 1.05  # for a method that needs no more than these, and trains nothing on maps:
MAPS = frozenset({"teacher", "maps"})
STEP_WITH_HEADS = 1.15  # for one that needs more, which heads give
# Needs that make a step another one, so that no bound on the sum means much.
NO_STEP_GOAL = {"second_view": "the student runs twice in a step"}
# The method that is measured beside all others; STEP is its goal although it trains modules.
REFERENCE = "FGD"


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


class StepBound(NamedTuple):
    """Of a method's step; ``bound`` None where there is no goal, and why not."""

    bound: Optional[float]
    reason: str = ""


def step_bound(method: str, needs: AbstractSet[str], parameters: int) -> StepBound:
    """The bound of a method, by what it needs and how many parameters it trains itself."""
    if method == REFERENCE:
        return StepBound(STEP)
    for need in sorted(needs & NO_STEP_GOAL.keys()):
        return StepBound(None, NO_STEP_GOAL[need])
    if parameters and {"maps", "student_maps"} & needs:
        return StepBound(None, "it trains modules on maps")
    return StepBound(STEP if needs <= MAPS else STEP_WITH_HEADS)


def step_goal(method: str, bound: float, over_parts: float, taught: bool = True) -> Goal:
    """Goal of a whole step.

    Args:
        over_parts: it over student step plus teacher forward. taught: False without a teacher.
    """
    parts = "student step + teacher forward" if taught else "student step"
    return Goal(f"{method}: distillation step over {parts}", bound, over_parts)
