"""What distillation does to single classes and sizes: how many change, and the gaps between them.

After "What's Left After Distillation?" (arXiv 2410.08407), which counts classes of classifiers. #SC
are those in which an arm differs significantly from the student alone, #TC those in which it
differs from its teacher. Here they are counted by AP, with the sign, and tested as all changes of
a study are, seeds included.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .arms import STUDENT, TEACHER
from .bootstrap import ALL
from .comparisons import AHEAD, BEHIND, SAME, verdict

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


def part_gap(metrics: Dict[str, Any], part: str) -> Optional[Gap]:
    """Of the classes or sizes of one row of `summarize`, one kind."""
    if part == "size":
        named = {text: metrics[key] for key, text in SIZES.items() if key in metrics}
    else:
        named = {k.removeprefix(_PREFIX): v for k, v in metrics.items() if k.startswith(_PREFIX)}
    return gap({name: spread["mean"] for name, spread in named.items()})


class Changed(NamedTuple):
    """Classes or sizes in which an arm is ahead of or behind another one, of how many."""

    ahead: List[str]
    behind: List[str]
    of: int

    def __str__(self) -> str:
        signs = [f"{sign}{len(x)}" for sign, x in zip("+−", (self.ahead, self.behind)) if x]
        count = f"{len(self.ahead) + len(self.behind)} of {self.of}"
        return f"{count} ({', '.join(signs)})" if signs else count


def changed_parts(compared: Sequence[dict], arm: str, against: str) -> Optional[Changed]:
    """#SC or #TC from the rows of `comparisons.correct`; None where the pair was not tested.

    Classes and sizes without a true object are not counted.
    """
    rows = [r for r in compared if (r["arm"], r["against"]) == (arm, against)]
    named = {r.get("size") or r["class"]: verdict(r) for r in rows if r.get("class") != ALL}
    found = {way: [name for name, x in named.items() if x == way] for way in (AHEAD, BEHIND, SAME)}
    if not any(found.values()):
        return None
    return Changed(found[AHEAD], found[BEHIND], sum(map(len, found.values())))


def part_table(
    rows: Sequence[dict], compared: Sequence[dict], kind: str, part: str
) -> List[List[str]]:
    """One line per arm; [] where there is one class, or objects of one size, only.

    Args:
        rows: of `summarize`. compared: all changes of this kind, of classes or of sizes.
        part: "class" or "size".
    """
    rows = [row for row in rows if kind in row and part_gap(row[kind], part)]
    columns = [f"differs from {STUDENT} (#SC)", f"differs from {TEACHER} (#TC)"]
    columns += [f"best {part}", f"worst {part}", "gap"]
    lines = []
    for row in rows:
        counts = [changed_parts(compared, row["arm"], x) for x in (STUDENT, TEACHER)]
        found = part_gap(row[kind], part)
        ends = [f"{name} {value:.1f}" for name, value in found]
        lines.append([row["arm"], *(str(x or "–") for x in counts), *ends, f"{found.size:.1f}"])
    return [["arm", *columns], *lines] if lines else []


PART_TEXT = (
    "By AP. #SC: in how many classes or sizes an arm differs from the student alone, #TC: from the "
    "teacher, + ahead and − behind, at a p of at most 0.05 after Holm's correction over the "
    "classes or sizes of the pair. Gap: AP of the best minus that of the worst, means over the "
    "seeds. Small objects have less than 32² pixels, large ones more than 96², as in COCO.",
)
