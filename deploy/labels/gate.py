"""Is the teacher good enough, and from which score on are its boxes right? By labelled images."""

from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from deploy.coco_ap import Outcomes
from deploy.errors import UserError

LEAST_BOXES = 5  # a share of fewer boxes says nothing


class Threshold(NamedTuple):
    """From which score on a class is labelled, and what that gave on the labelled images.

    wanted: precision asked for. score: lowest one labelled. precision: share of those boxes that
    are right. recall: share of the objects that they find. boxes: their number.
    """

    wanted: float
    score: float
    precision: float
    recall: float
    boxes: int


def parse_precisions(texts: Sequence[str], classes: Sequence[str]) -> Dict[str, Optional[float]]:
    """Class → precision asked for, None for a class that is not to be labelled.

    Args:
        texts: "0.9" for all classes, "CLASS=0.7" or "CLASS=none" for one.
    Raises:
        UserError: a class that there is not, or no precision above 0 and up to 1.
    """
    own: Dict[str, Optional[float]] = {}
    general = 0.9
    for text in texts:
        name, equals, value = text.rpartition("=")
        if equals and name not in classes:
            raise UserError(
                f"--precision {text}: the teacher has no class {name!r}; it has "
                f"{', '.join(classes)}"
            )
        if not equals:
            general = _precision(text, value)
        else:
            own[name] = None if value == "none" else _precision(text, value)
    return {name: own.get(name, general) for name in classes}


def _precision(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise UserError(
            f"--precision {text}: expected a number above 0 and up to 1, as 0.9, CLASS=0.7 or "
            "CLASS=none"
        )
    return number


def lowest_score(found: Outcomes, wanted: float) -> Optional[Threshold]:
    """The lowest score from which on the boxes have the precision; None if there is none."""
    order = np.argsort(-found.scores, kind="stable")
    scores, hits = found.scores[order], found.hits[order].cumsum()
    counts = np.arange(1, len(scores) + 1)
    last = np.append(scores[1:] < scores[:-1], True)[: len(scores)]  # of boxes of equal score
    enough = np.flatnonzero(last & (counts >= LEAST_BOXES) & (hits >= wanted * counts - 1e-9))
    if not enough.size:
        return None
    i = enough[-1]
    precision, recall = float(hits[i] / counts[i]), float(hits[i] / max(found.objects, 1))
    return Threshold(wanted, float(scores[i]), precision, recall, int(counts[i]))


def choose_thresholds(
    outcomes: Dict[str, Outcomes], wanted: Dict[str, Optional[float]], dataset: str
) -> Dict[str, Threshold]:
    """By class; without those that are not to be labelled.

    Raises:
        UserError: a class does not reach its precision, or no class is to be labelled. To leave its
            boxes out unasked would teach that its objects are background.
    """
    chosen: Dict[str, Threshold] = {}
    failed: List[str] = []
    for name, precision in wanted.items():
        if precision is None:
            continue
        found = lowest_score(outcomes[name], precision)
        if found is None:
            failed.append(f"{name!r} ({_why(outcomes[name], precision)})")
        else:
            chosen[name] = found
    if failed:
        raise UserError(
            f"no score gives the precision asked for on {dataset}: {', '.join(failed)}. Nothing "
            "was written; ask for less with --precision CLASS=0.7, or have a class not labelled "
            "with --precision CLASS=none"
        )
    if not chosen:
        raise UserError("--precision leaves every class out: there is nothing to label")
    return chosen


def _why(found: Outcomes, wanted: float) -> str:
    if len(found.scores) < LEAST_BOXES:
        return f"{len(found.scores)} boxes found, {LEAST_BOXES} are needed to tell"
    hits = found.hits[np.argsort(-found.scores, kind="stable")].cumsum()
    shares = hits / np.arange(1, len(hits) + 1)
    return f"{shares[LEAST_BOXES - 1 :].max():.3f} at best, asked {wanted:g}"
