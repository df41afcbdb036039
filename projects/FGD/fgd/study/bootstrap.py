"""Is a change in AP more than luck? A paired bootstrap on two levels, test images and seeds.

Both arms are measured on the same resampled sets of test images and the same seeds. So the interval
covers which images were drawn for the test and, with two seeds or more, which were drawn for the
training.
"""

from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from .arms import TEACHER
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
    per_class = average_precision(matches.classes, sets)
    named = dict(zip(matches.classes, per_class.T, strict=True))
    return {ALL: overall(per_class), **(named if len(named) > 1 else {})}


def size_replicates(matches: Matches, sets: np.ndarray) -> Dict[str, np.ndarray]:
    """As `replicates`, of the objects of each size: COCO's APs, APm and APl."""
    return {name: overall(average_precision(x, sets)) for name, x in matches.sizes.items()}


def change(arm: Sequence[np.ndarray], against: Sequence[np.ndarray]) -> Change:
    """The change between two arms from their replicates, seed by seed.

    d_s(b) is arm minus against with seed s on set b. What set b stands for is

        mean over the S seeds of d_s(b) + sd / sqrt(S) · t_b

    with sd, the deviation of the d_s on the real set, and t_b, a draw of Student's t with S - 1
    degrees of freedom. Seeds drawn with replacement would be far too alike where there are three.
    Two arms without a difference are told apart at p <= 0.05 in at most 5 % of studies, whatever
    part of the spread is of seeds and of images. One seed says nothing of others: then the
    interval covers images alone.

    The interval is of percentiles; p is twice the smaller share of sets on either side of no
    change, so that p < 0.05 says that 0 lies outside the interval. Sets without a true object of
    the class do not count; without any, all is NaN.
    """
    by_seed = np.asarray(arm) - np.asarray(against)  # (S, 1 + resamples)
    differences, seeds = by_seed.mean(axis=0), len(by_seed)
    if seeds > 1:
        t = np.random.default_rng(seeds).standard_t(seeds - 1, len(differences) - 1)
        differences[1:] += by_seed[:, 0].std(ddof=1) / np.sqrt(seeds) * t
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
    of_runs: Dict[Tuple[str, int], Dict[str, np.ndarray]],
    pairs: Sequence[Tuple[str, str]],
    part: str = "class",
) -> List[dict]:
    """One row per pair of arms and class: {"arm", "against", "class", "seeds", and `Change`'s}.

    Args:
        of_runs: (arm, seed) → `replicates`. pairs: (arm, against); what shares no seed is left
            out. The one teacher is compared with every seed, class by class: that it is better
            over all is no question.
        part: "size" of `size_replicates`, which then is the key of a row in place of "class".
    """
    rows = []
    for arm, against in pairs:
        fixed = next((s for a, s in of_runs if a == TEACHER), None) if against == TEACHER else None
        other = {s: (against, s if fixed is None else fixed) for a, s in of_runs if a == arm}
        seeds = [s for s, run in other.items() if run in of_runs]
        for name in of_runs[arm, seeds[0]] if seeds else ():
            if against == TEACHER and name == ALL:
                continue
            found = change(
                [of_runs[arm, s][name] for s in seeds], [of_runs[other[s]][name] for s in seeds]
            )
            row = {"arm": arm, "against": against, part: name, "seeds": seeds}
            rows.append({**row, **found._asdict()})
    return rows
