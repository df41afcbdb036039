"""Which arms are compared, and which differences remain when so many are looked at."""

import math
from collections import defaultdict
from typing import Dict, List, Sequence, Tuple

from detectron2.config import CfgNode

from .arms import (
    LONG,
    SINGLE,
    STAGES,
    STUDENT,
    TEACHER,
    TIMED,
    is_ablation,
    main_arm,
    method_arms,
    reference_arm,
)
from .bootstrap import ALL
from .labels import BOTH, PSEUDO, UNLABELED

LEVEL = 0.05  # a corrected p above it tells nothing apart
AHEAD, BEHIND, SAME = "ahead", "behind", "not told apart"


def pairs(arms: Sequence[str], cfg: CfgNode) -> List[Tuple[str, str]]:
    """Which arm is compared with which, of those that are there.

    Each with the student alone; the main arm, those of methods and those of equal time with the
    student that had their time, methods also with FGD; each ablation with the main arm, as those of
    pictures without labels; several teachers in a row with one of them for as long.
    """
    main = main_arm(cfg)
    distilled = [arm for arm in arms if arm == main or arm in method_arms(arms)]
    found = [(arm, STUDENT) for arm in arms if arm not in (STUDENT, TEACHER)]
    found += [(arm, LONG) for arm in distilled]
    found += [(arm, reference_arm(arm, arms, cfg)) for arm in distilled]
    found += [(arm, main) for arm in arms if is_ablation(arm)]
    timed = [arm for arm in TIMED if arm != LONG]
    found += [(arm, LONG) for arm in timed] + [(arm, main) for arm in timed]
    found += [(UNLABELED, main), (BOTH, main), (BOTH, PSEUDO), (STAGES, SINGLE)]
    return [(arm, against) for arm, against in found if arm in arms and against in arms]


def teacher_pairs(arms: Sequence[str], cfg: CfgNode) -> List[Tuple[str, str]]:
    """The student alone and the arms that distil, each with the teacher, if there is one."""
    found = [STUDENT, main_arm(cfg), *method_arms(arms)]
    return [(arm, TEACHER) for arm in dict.fromkeys(found) if {arm, TEACHER} <= {*arms}]


def holm(ps: Sequence[float]) -> List[float]:
    """p values corrected for their number (Holm 1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, is never below the one before it, and at
    most 1. Claiming what is up to 5 % then makes even one false claim with a chance of at most
    5 %, whatever is true of the others. A NaN stays one and does not count.
    """
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    corrected, least = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        least = corrected[i] = max(least, min(1.0, (len(order) - rank) * ps[i]))
    return corrected


def _families(changes: Dict[str, List[dict]]) -> Dict[tuple, List[dict]]:
    """What is corrected together: () → rows of all classes; (kind, arm, against) → its classes,
    or its sizes.
    """
    families: Dict[tuple, List[dict]] = defaultdict(list)
    for kind, compared in changes.items():
        for row in compared:
            pair = () if row.get("class") == ALL else (kind, row["arm"], row["against"])
            families[pair].append(row)
    return families


def correct(changes: Dict[str, List[dict]]) -> Dict[str, List[dict]]:
    """The rows of every kind with "corrected": p by `holm` over their family.

    Rows of all classes are one family, boxes and masks together, because a page claims something of
    both. The single classes of a pair of arms, boxes or masks, are another one, as are its sizes.
    """
    values: Dict[int, float] = {}
    for rows in _families(changes).values():
        values.update(zip(map(id, rows), holm([row["p"] for row in rows]), strict=True))
    return {
        kind: [{**row, "corrected": values[id(row)]} for row in compared]
        for kind, compared in changes.items()
    }


def number_of_tests(
    classes: Dict[str, List[dict]], sizes: Dict[str, List[dict]]
) -> Tuple[int, int]:
    """How many p values `correct` corrects for: of all classes, and of single parts at most."""
    counts: Dict[tuple, int] = defaultdict(int)
    for changes in (classes, sizes):
        for family, rows in _families(changes).items():
            counts[family] = max(counts[family], sum(not math.isnan(row["p"]) for row in rows))
    return counts.pop((), 0), max(counts.values(), default=0)


def verdict(row: dict) -> str:
    """What a row of `correct` may be said to show; "" where there is no p."""
    if math.isnan(row["p"]):
        return ""
    if row["corrected"] > LEVEL or not row["difference"]:
        return SAME
    return AHEAD if row["difference"] > 0 else BEHIND
