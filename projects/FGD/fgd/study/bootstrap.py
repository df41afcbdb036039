"""Is a change in AP more than the luck of the test images? A paired bootstrap over them.

Both arms are measured on the same resampled sets of test images, averaged over the same seeds. So
the interval covers which images were drawn for the test, and not which seeds were drawn for the
training: their spread is the ± of the summary.
"""

from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from .matches import Matches, average_precision, overall

ALL = "all classes"


class Change(NamedTuple):
    """AP of one arm minus AP of another, in points, with its 95 % interval and two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def resampled_sets(images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """(1 + resamples, images): how often each image is drawn; the first row is the real set."""
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)
    return np.concatenate([np.ones((1, images), drawn.dtype), drawn])


def replicates(matches: Matches, sets: np.ndarray) -> Dict[str, np.ndarray]:
    """AP in percent on every set, (1 + resamples,), of all classes and, if several, of each."""
    per_class = average_precision(matches, sets)
    named = dict(zip(matches.classes, per_class.T, strict=True))
    return {ALL: overall(per_class), **(named if len(named) > 1 else {})}


def change(arm: Sequence[np.ndarray], against: Sequence[np.ndarray]) -> Change:
    """The change between two arms from their replicates, seed by seed.

    The interval is of percentiles; p is twice the smaller share of sets on either side of no
    change, so that p < 0.05 says that 0 lies outside the interval. Sets without a true object of
    the class do not count; without any, all is NaN.
    """
    differences = np.mean(arm, axis=0) - np.mean(against, axis=0)
    drawn = differences[1:][~np.isnan(differences[1:])]
    if not len(drawn) or np.isnan(differences[0]):
        return Change(*[float("nan")] * 4)
    low, high = np.percentile(drawn, (2.5, 97.5))
    # One is added to each count: no finite number of sets shows that p is 0.
    sides = [
        (1 + np.sum(drawn <= 0)) / (1 + len(drawn)),
        (1 + np.sum(drawn >= 0)) / (1 + len(drawn)),
    ]
    return Change(float(differences[0]), float(low), float(high), float(min(1.0, 2 * min(sides))))


def compare(
    of_runs: Dict[Tuple[str, int], Dict[str, np.ndarray]], pairs: Sequence[Tuple[str, str]]
) -> List[dict]:
    """One row per pair of arms and class: {"arm", "against", "class", "seeds", and `Change`'s}.

    Args:
        of_runs: (arm, seed) → `replicates`. pairs: (arm, against); what shares no seed is left out.
    """
    rows = []
    for arm, against in pairs:
        seeds = [s for a, s in of_runs if a == arm and (against, s) in of_runs]
        for name in of_runs[arm, seeds[0]] if seeds else ():
            found = change(
                [of_runs[arm, s][name] for s in seeds], [of_runs[against, s][name] for s in seeds]
            )
            row = {"arm": arm, "against": against, "class": name, "seeds": seeds}
            rows.append({**row, **found._asdict()})
    return rows
