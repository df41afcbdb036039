"""The answer of a study in a few sentences: does it pay, against what, and what does it cost?"""

from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

from .arms import LONG, SINGLE, STUDENT, TEACHER
from .bootstrap import ALL
from .comparisons import AHEAD, BEHIND, SAME, verdict

# What an arm has to be ahead of, the fairest comparison first.
_REFERENCES = {
    LONG: "the student trained as long",
    SINGLE: "one teacher for as long",
    STUDENT: "the student alone",
}
_ANSWERS = {
    AHEAD: "It pays",
    BEHIND: "It does harm",
    SAME: "It does not pay, as far as this study can tell",
}
_ALONE = "a comparison of its own would tell it, the {} of this page do not"
_LONGER = 1.05  # times the student's step: less is the noise of the clock


class Judged(NamedTuple):
    """An arm, and the row of `comparisons.correct` that decides about it."""

    arm: str
    row: dict

    @property
    def verdict(self) -> str:
        return verdict(self.row)


def headline(
    rows: Sequence[dict],
    changes: Dict[str, List[dict]],
    distilled: Sequence[str],
    measured: Mapping[str, dict],
) -> List[str]:
    """Sentences, the verdict first; boxes and masks apart where there are both.

    Args:
        rows: of `summarize`. changes: of classes, kind by kind.
        distilled: the arms that the study is about; [] = all but students alone.
        measured: arm of equal time → `budget.equal_time`.
    """
    lines: List[str] = []
    teacher = next((row for row in rows if row["arm"] == TEACHER), {})
    ratios = _ratios(rows, measured)
    for kind, compared in changes.items():
        tested = _overall(compared)
        judged = _judge(tested, distilled)
        found = _verdict(judged, tested, len(tested)) + _others(judged) + _doubts(judged, ratios)
        name = {"bbox": "Boxes: ", "segm": "Masks: "}[kind] if len(changes) > 1 else ""
        lines += [f"{name}{line}" for line in found]
        if judged and kind == list(changes)[-1]:
            lines += _cost(judged, ratios, teacher)
    if not lines:
        return [f"Nothing can be said yet: no arm has been tested against {STUDENT}."]
    return lines


def best_arms(changes: Dict[str, List[dict]], distilled: Sequence[str]) -> List[str]:
    """The arms that `headline` speaks of, in its order; of boxes where there are masks too."""
    compared = next(iter(changes.values()), [])
    return [x.arm for x in _judge(_overall(compared), distilled)]


def _overall(compared: Sequence[dict]) -> Dict[Tuple[str, str], dict]:
    return {(x["arm"], x["against"]): x for x in compared if x["class"] == ALL and verdict(x)}


def _judge(tested: Dict[Tuple[str, str], dict], distilled: Sequence[str]) -> List[Judged]:
    """Each arm against its fairest reference, the largest gain of what is ahead first."""
    arms = distilled or [arm for arm, _ in tested if arm not in (LONG, SINGLE)]
    judged = []
    for arm in dict.fromkeys(arms):
        found = (tested.get((arm, against)) for against in _REFERENCES)
        row = next((row for row in found if row), None)
        judged += [Judged(arm, row)] if row else []
    order = [AHEAD, SAME, BEHIND]
    return sorted(judged, key=lambda x: (order.index(x.verdict), -x.row["difference"]))


def gain(row: dict, p: bool = True) -> str:
    """For example "+3.6 AP (2.3 to 4.7; corrected p 0.002)"."""
    corrected = f"; corrected p {row['corrected']:.3f}" if p else ""
    return f"{row['difference']:+.1f} AP ({row['low']:.1f} to {row['high']:.1f}{corrected})"


def _verdict(
    judged: Sequence[Judged], tested: Dict[Tuple[str, str], dict], comparisons: int
) -> List[str]:
    if not judged:
        return []
    best, against = judged[0], judged[0].row["against"]
    answer, doubt = _ANSWERS[best.verdict], ""
    if best.verdict == SAME:
        doubt = ", which cannot be told from no change"
        if best.row["low"] > 0 or best.row["high"] < 0:  # but for the correction
            answer = "It may pay" if best.row["low"] > 0 else "It may do harm"
            doubt = f", but {_ALONE.format(comparisons)}: take more seeds or fewer arms"
    text = f"{answer}: {best.arm} {gain(best.row)} over {_REFERENCES[against]}{doubt}"
    alone = tested.get((best.arm, STUDENT))
    if against != STUDENT and alone:
        shown = " (not told apart)" if verdict(alone) == SAME else ""
        text += f"; {gain(alone)} over {_REFERENCES[STUDENT]}{shown}"
    return [f"{text}."]


def _others(judged: Sequence[Judged]) -> List[str]:
    if len(judged) < 2:
        return []
    parts = []
    for way, text in ((AHEAD, "ahead"), (SAME, "not told apart"), (BEHIND, "behind")):
        arms = [f"{x.arm} {x.row['difference']:+.1f}" for x in judged if x.verdict == way]
        parts += [f"{text}: {', '.join(arms)}"] if arms else []
    against = dict.fromkeys(_REFERENCES[x.row["against"]] for x in judged)
    return [f"Against {' or '.join(against)}, {'; '.join(parts)}."]


def _ratios(rows: Sequence[dict], measured: Mapping[str, dict]) -> Dict[str, float]:
    """Arm → its step over the student's: timed beside each other, else as their logs have them."""
    ratios: Dict[str, float] = {}
    logged = {row["arm"]: row["seconds"] for row in rows if row["seconds"]}
    for seconds in (logged, *(budget["seconds"] for budget in measured.values())):
        student = seconds.get(STUDENT)
        ratios |= {arm: x / student for arm, x in seconds.items()} if student else {}
    return ratios


def _doubts(judged: Sequence[Judged], ratios: Dict[str, float]) -> List[str]:
    """What the verdict does not cover."""
    lines = []
    ahead = [x.arm for x in judged if x.row["against"] == STUDENT and x.verdict == AHEAD]
    longer = [arm for arm in ahead if ratios.get(arm, _LONGER) >= _LONGER]
    if longer:
        lines.append(
            "No student was trained for the time that distillation takes, which may explain a part "
            f"of it: add the arm {LONG}."
        )
    if any(len(x.row["seeds"]) == 1 for x in judged):
        lines.append("With one seed the intervals do not cover the luck of the training.")
    return lines


def _cost(judged: Sequence[Judged], ratios: Dict[str, float], teacher: dict) -> List[str]:
    """Of the arms that are ahead, or without any of all: time in training, none at inference."""
    ahead = [x.arm for x in judged if x.verdict == AHEAD] or [x.arm for x in judged]
    known = sorted(ratios[arm] for arm in ahead if arm in ratios)
    lines = []
    if known:
        ends = dict.fromkeys(f"{x:.2f}" for x in (known[0], known[-1]))
        whose = ahead[0] if len(ahead) == 1 else "these arms"
        own = ""
        if teacher.get("minutes") and teacher.get("iterations"):  # it was trained here
            own = f"; training the teacher took {teacher['minutes']:.0f} minutes more, once"
        lines.append(
            f"Cost in training: a step of {whose} takes {' to '.join(ends)} times as long as the "
            f"student's{own}."
        )
    return [*lines, "Cost at inference: none, the network is the student's."]
