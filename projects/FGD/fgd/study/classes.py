"""What distillation does to single classes and sizes: how many change, and the gaps between them.

After "What's Left After Distillation?" (arXiv 2410.08407), which counts classes of classifiers. #SC
are those in which an arm differs significantly from the student alone, #TC those in which it
differs from its teacher. Here they are counted by AP, with the sign, and tested as all changes of
a study are, seeds included.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .arms import STUDENT, TEACHER
from .bootstrap import ALL
from .comparisons import AHEAD, BEHIND, verdict

_PREFIX = "AP-"
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


class Gap(NamedTuple):
    """The best and the worst of several, with their AP in percent."""

    best: Tuple[str, float]
    worst: Tuple[str, float]

    @property
    def size(self) -> float:
        return self.best[1] - self.worst[1]


def gap(values: Dict[str, Optional[float]]) -> Optional[Gap]:
    """Between the highest and the lowest value; None for fewer than two that have one."""
    known = {name: x for name, x in values.items() if x is not None and x == x}
    if len(known) < 2:
        return None
    best, worst = max(known, key=known.get), min(known, key=known.get)
    return Gap((best, known[best]), (worst, known[worst]))


def class_gap(metrics: Dict[str, Any]) -> Optional[Gap]:
    """Of the classes of one row of `summarize`, one kind."""
    named = {k.removeprefix(_PREFIX): v for k, v in metrics.items() if k.startswith(_PREFIX)}
    return gap({name: spread["mean"] for name, spread in named.items()})


def size_gap(metrics: Dict[str, Any]) -> Optional[Gap]:
    """As `class_gap` of COCO's small, medium and large objects."""
    return gap({text: metrics[key]["mean"] for key, text in SIZES.items() if key in metrics})


class Changed(NamedTuple):
    """Classes in which an arm is ahead of or behind another one, of how many."""

    ahead: List[str]
    behind: List[str]
    of: int

    def __str__(self) -> str:
        signs = [f"{sign}{len(x)}" for sign, x in zip("+−", (self.ahead, self.behind)) if x]
        count = f"{len(self.ahead) + len(self.behind)} of {self.of}"
        return f"{count} ({', '.join(signs)})" if signs else count


def changed_classes(compared: Sequence[dict], arm: str, against: str) -> Optional[Changed]:
    """#SC or #TC from the rows of `comparisons.correct`; None where the pair was not tested."""
    rows = [r for r in compared if (r["arm"], r["against"]) == (arm, against) and r["class"] != ALL]
    if not rows:
        return None
    found = {way: [r["class"] for r in rows if verdict(r) == way] for way in (AHEAD, BEHIND)}
    return Changed(found[AHEAD], found[BEHIND], len(rows))


def class_table(rows: Sequence[dict], compared: Sequence[dict], kind: str) -> List[List[str]]:
    """One line per arm; [] where there is one class only.

    Args:
        rows: of `summarize`. compared: all changes of this kind.
    """
    rows = [row for row in rows if kind in row and class_gap(row[kind])]
    columns = [f"differs from {STUDENT} (#SC)", f"differs from {TEACHER} (#TC)"]
    columns += ["best class", "worst class", "gap", "gap of sizes"]
    lines = []
    for row in rows:
        counts = [changed_classes(compared, row["arm"], x) for x in (STUDENT, TEACHER)]
        classes, sizes = class_gap(row[kind]), size_gap(row[kind])
        ends = [f"{name} {value:.1f}" for name, value in classes]
        gaps = [f"{x.size:.1f}" if x else "–" for x in (classes, sizes)]
        lines.append([row["arm"], *(str(x or "–") for x in counts), *ends, *gaps])
    return [["arm", *columns], *lines] if lines else []


CLASS_TEXT = (
    "Classes by AP. #SC: in how many an arm differs from the student alone, #TC: from the teacher, "
    "+ ahead and − behind, at a p of at most 0.05 after Holm's correction over the classes of the "
    "pair. Gap: AP of the best class minus that of the worst, means over the seeds. Gap of sizes: "
    "the same of small, medium and large objects.",
)
