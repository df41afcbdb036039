"""The figures of a study: AP of every arm over its seeds, and the changes between arms."""

import math
import statistics
from collections import defaultdict
from typing import AbstractSet, Any, Dict, List, NamedTuple, Optional, Sequence

from detectron2.config import CfgNode

from fgd_inputs.json_file import number, read_json

from ..data.datasets import coco_ground_truth, register_from_config
from ..errors import UserError
from .arms import STUDENT, TEACHER
from .bootstrap import ALL, compare, replicates, resampled_sets, size_replicates
from .budget import step_seconds
from .comparisons import correct, pairs, teacher_pairs
from .files import is_finished, read_factor, read_minutes, read_result
from .matches import index_truth, match
from .run import Run, parts
from .runs import kinds

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_DETECTIONS = "inference/coco_instances_results.json"
_AGAIN = "delete its results.json, and call the study again, which then evaluates it"


def spread(values: Sequence[Optional[float]]) -> dict:
    """{"each", "mean", "sd"}; the deviation is of the sample, None for a single value.

    A metric that is undefined (None: no true object of that size) is so for all seeds.
    """
    if not values or any(value is None for value in values):
        return {"each": list(values), "mean": None, "sd": None}
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"each": list(values), "mean": statistics.mean(values), "sd": sd}


def gap_closed(arm: float, student: float, teacher: float) -> Optional[float]:
    """Percent of the way from the student alone to its teacher; None if that is not ahead."""
    return 100 * (arm - student) / (teacher - student) if teacher > student else None


def summarize(runs: Sequence[Run]) -> List[dict]:
    """One row per arm that has finished runs, in the order of ``runs``; not of stages on the way.

    Returns:
        {"arm", "seeds", "iterations", "minutes": mean or None, "seconds": of a step or None,
        "factors": MODEL.DISTILLER.FACTOR of each seed or [], with --select best "chosen": the
        iterations of each seed's best checkpoint, and per kind ("bbox", "segm"):
        {metric: `spread`, "gap closed": percent or None}}; metrics include "AP-<class>".
    """
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs if run.arm not in parts(runs)):
        done = [run for run in runs if run.arm == arm and is_finished(run)]
        if not done:
            continue
        results = [read_result(run) for run in done]
        minutes = [m for m in map(_chain_minutes, done) if m is not None]
        seconds = step_seconds([part.folder for run in done for part in run.chain])
        row = {
            "arm": arm,
            "seeds": [run.seed for run in done],
            "iterations": _iterations(done[0]),
            "minutes": statistics.mean(minutes) if minutes else None,
            "seconds": None if math.isnan(seconds) else seconds,
            "factors": [f for f in map(read_factor, done) if f is not None],
        }
        if done[0].select:
            row["chosen"] = [result["iteration"] for result in results]
        for kind in kinds(results[0]):
            names = results[0][kind]
            row[kind] = {name: spread([r[kind][name] for r in results]) for name in names}
        rows.append(row)
    _add_gaps({row["arm"]: row for row in rows})
    return rows


def _iterations(run: Run) -> Optional[int]:
    """Of all trainings that made its student."""
    trainings = [part.trained for part in run.chain]
    counts = [read_result(part)["iteration"] for part in trainings if is_finished(part)]
    return None if None in counts else sum(counts)


def _chain_minutes(run: Run) -> Optional[float]:
    minutes = [read_minutes(part) for part in run.chain]
    return None if None in minutes else sum(minutes)


def _add_gaps(rows: Dict[str, dict]) -> None:
    """Fill in "gap closed" where student, teacher and the arm itself have the AP."""
    for arm, row in rows.items():
        for kind in kinds(row):
            involved = [rows[a][kind]["AP"]["mean"] for a in (arm, STUDENT, TEACHER) if a in rows]
            usable = len(involved) == 3 and None not in involved and arm not in (STUDENT, TEACHER)
            row[kind]["gap closed"] = gap_closed(*involved) if usable else None


class Changes(NamedTuple):
    """kind → rows of `comparisons.correct`."""

    classes: Dict[str, List[dict]] = {}
    sizes: Dict[str, List[dict]] = {}


def changes(runs: Sequence[Run], cfg: CfgNode, resamples: int) -> Changes:
    """How arms differ, from the detections that the runs have saved.

    Raises:
        UserError: detections are missing, or are not those of the run's results.
    """
    done = [run for run in runs if is_finished(run)]
    arms = list(dict.fromkeys(run.arm for run in done if run.arm not in parts(runs)))
    compared = pairs(arms, cfg)
    compared += teacher_pairs(arms, cfg)
    wanted = {arm for pair in compared for arm in pair}
    if not compared:
        return Changes()
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(done[0].folder)  # generated sets are there
    truth = index_truth(ground_truth(cfg))
    sets = resampled_sets(len(truth.imgs), resamples)
    found: Dict[str, Dict] = defaultdict(dict)
    sizes: Dict[str, Dict] = defaultdict(dict)
    for run in done:
        if run.arm in wanted:
            detections, result = saved_detections(run, truth.imgs.keys()), read_result(run)
            for kind in kinds(result):
                matches = match(truth, detections, kind)
                of_run = replicates(matches, sets)
                _check_same(run, kind, of_run[ALL][0], result[kind]["AP"])
                found[kind][run.arm, run.seed] = of_run
                sizes[kind][run.arm, run.seed] = size_replicates(matches, sets)
    return Changes(
        correct({kind: compare(of_runs, compared) for kind, of_runs in found.items()}),
        correct({kind: compare(of_runs, compared, "size") for kind, of_runs in sizes.items()}),
    )


def ground_truth(cfg: CfgNode) -> dict:
    """The test set as a COCO dict, the one that Detectron2's evaluation uses."""
    (name,) = register_from_config(cfg, ("TEST",)).DATASETS.TEST
    return coco_ground_truth(name)


def saved_detections(run: Run, images: Optional[AbstractSet] = None) -> List[dict]:
    """What a run has detected on the test images, as COCO results.

    Raises:
        UserError: the file is missing, or holds something else than detections, or images that are
            not among ``images``, if these are known.
    """
    path = run.reported / _DETECTIONS
    if not path.exists():
        raise UserError(f"{run}: {path} is missing; {_AGAIN}")
    found = read_json(str(path), "detections")
    entries = found if isinstance(found, list) else [None]
    if not all(map(_is_detection, entries)):
        raise UserError(f"{run}: {path} has something else than detections; {_AGAIN}")
    if images is not None and not {x["image_id"] for x in entries} <= images:
        raise UserError(f"{run}: {path} has images that are not in the test set; {_AGAIN}")
    return entries


def _is_detection(entry: Any) -> bool:
    """Whether it is one of COCO's result format."""
    if not isinstance(entry, dict) or not {"image_id", "category_id"} <= entry.keys():
        return False
    box = entry.get("bbox", [])
    values = [entry.get("score"), *(box if isinstance(box, list) else [None])]
    return isinstance(entry["image_id"], (int, str)) and None not in map(number, values)


def _check_same(run: Run, kind: str, found: float, reported: Optional[float]) -> None:
    """Another evaluation into the same folder would leave detections that are not the results'.

    Detectron2 reports no AP at all, not 0, where nothing was detected.
    """
    if not abs(found - (reported or 0.0)) < 0.01:
        raise UserError(
            f"{run}: results.json says {kind} AP {reported}, but the saved detections give "
            f"{found:.4f}; {_AGAIN}"
        )
