"""--select best: the checkpoint that a validation set chose, reported on the test set."""

import os
from typing import Dict, List, Mapping, Sequence

from detectron2.config import CfgNode

from ..data.contents import shared_between
from ..data.datasets import image_sets
from ..engine.solver import check_solver
from ..errors import UserError
from .arms import LONG, SINGLE, TEACHER, TIMED, study_config
from .run import Run, parts

_KEY, _METRIC = "SOLVER.KEEP_BEST", "bbox/AP"


def keeping_best(config_file: str, opts: Mapping[str, str]) -> Dict[str, str]:
    """The options of a study whose runs keep their best checkpoint.

    Raises:
        UserError: no validation set, nothing that is evaluated on it while training, or test images
            in it.
    """
    cfg = study_config(config_file, dict(opts))
    own = {**opts, _KEY: cfg.SOLVER.KEEP_BEST or _METRIC}
    if not (cfg.DATASETS.JSON.VALID or cfg.DATASETS.VALID):
        raise UserError(
            "--select best: there is no validation set to choose by, and the test set only "
            "reports; set DATASETS.JSON.VALID to its COCO JSON"
        )
    check_solver(study_config(config_file, own))
    _check_apart(cfg)
    return own


def _check_apart(cfg: CfgNode) -> None:
    node = cfg.DATASETS.JSON
    if not all(os.path.isfile(os.path.expanduser(node[split])) for split in ("TEST", "VALID")):
        return  # sets of another kind, or a report of a study whose data are gone
    shared = shared_between(image_sets(cfg, "TEST"), image_sets(cfg, "VALID"), "test", "validation")
    if shared:
        raise UserError(f"--select best: {shared}; choose by other images")


def selected(runs: Sequence[Run]) -> List[Run]:
    """The runs, of which those of students are reported by their best checkpoint.

    A chain's next stage starts from the last checkpoint of the one before, whose figures are those
    of that one.
    """
    last = {TEACHER, *parts(runs)}
    return [run._replace(select=run.arm not in last) for run in runs]


def select_facts(runs: Sequence[Run], cfg: CfgNode) -> List[str]:
    """What the reader must know of the choice."""
    chosen = [run for run in runs if run.select]
    if not chosen:
        return []
    data, metric = cfg.DATASETS, chosen[0].opts[_KEY]
    name = data.JSON.VALID or ", ".join(data.VALID)
    lines = [
        f"Each student is the checkpoint of its run with the best {metric} on the validation set "
        f"{name}, evaluated every {cfg.TEST.EVAL_PERIOD} iterations; the test set had no part in "
        "the choice. Chosen at: after so many iterations. A teacher is the checkpoint that teaches."
    ]
    longer = [arm for arm in (LONG, SINGLE) if any(run.arm == arm for run in chosen)]
    if longer:
        lines.append(f"Longer runs ({', '.join(longer)}) have more checkpoints to choose from.")
    timed = [arm for arm in TIMED if arm != LONG and any(run.arm == arm for run in chosen)]
    if timed:
        lines.append(
            f"Runs for equal time ({', '.join(timed)}) have more or fewer, as they have iterations."
        )
    return lines
