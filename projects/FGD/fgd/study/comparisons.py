"""Which arms are compared, and which differences remain when so many are looked at."""

import math
from typing import Dict, List, Sequence, Tuple

from detectron2.config import CfgNode

from .arms import (
    LONG,
    SINGLE,
    STAGES,
    STUDENT,
    TEACHER,
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

    Each with the student alone; the main arm and those of methods with the student that had their
    time, and with FGD if they are another method; each ablation with the main arm, as
    those of pictures without labels that distil; several teachers in a row with one of them for as
    long.
    """
    main = main_arm(cfg)
    distilled = [arm for arm in arms if arm == main or arm in method_arms(arms)]
    found = [(arm, STUDENT) for arm in arms if arm not in (STUDENT, TEACHER)]
    found += [(arm, LONG) for arm in distilled]
    found += [(arm, reference_arm(arm, arms, cfg)) for arm in distilled]
    found += [(arm, main) for arm in arms if is_ablation(arm)]
    found += [(UNLABELED, main), (BOTH, main), (BOTH, PSEUDO), (STAGES, SINGLE)]
    return [(arm, against) for arm, against in found if arm in arms and against in arms]


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


def correct(changes: Dict[str, List[dict]]) -> Dict[str, List[dict]]:
    """The rows of every kind, those of all classes with "corrected": p by `holm` over all these.

    Boxes and masks are one family, because a page claims something of both. Rows of single classes
    have None.
    """
    rows = [row for compared in changes.values() for row in compared if row["class"] == ALL]
    values = dict(zip(map(id, rows), holm([row["p"] for row in rows]), strict=True))
    return {
        kind: [{**row, "corrected": values.get(id(row))} for row in compared]
        for kind, compared in changes.items()
    }


def number_of_tests(changes: Dict[str, List[dict]]) -> int:
    """How many p values `correct` corrects for."""
    rows = [row for compared in changes.values() for row in compared]
    return sum(row["class"] == ALL and not math.isnan(row["p"]) for row in rows)


def verdict(row: dict) -> str:
    """What a row of `correct` may be said to show; "" where there is no p."""
    if math.isnan(row["p"]):
        return ""
    if row["corrected"] > LEVEL or not row["difference"]:
        return SAME
    return AHEAD if row["difference"] > 0 else BEHIND
