"""A study goes on with the runs that are there, if they are what is asked for now."""

import os
from typing import Dict, List, Optional, Sequence

from detectron2.config import CfgNode

from ..config import load_config
from ..data.contents import describe_sets
from ..data.datasets import image_sets
from ..engine.config_change import continuing_changes, differences, result_changes
from ..engine.results import BEST
from ..engine.run_folder import recorded
from ..errors import UserError
from ..weights import weights_sha256
from .arms import TIMED
from .factors import KEY
from .files import has_results, was_given_factor
from .run import Run

_CHOICE = ("TEST.EVAL_PERIOD", "SOLVER.KEEP_BEST")
_WAYS_OUT = "use another --output, or delete that folder"


def check_earlier(runs: Sequence[Run]) -> None:
    """Raise UserError if a run that is there already had another config than is now asked for.

    Of one that has not finished it is what `--resume` would refuse, with ways out that a study has.
    Also if one that measures its factor now was given it then: its page would say otherwise.
    """
    for run in runs:
        if run.balance and was_given_factor(run):
            raise UserError(
                f"{run}: begun in {run.folder} with a given {KEY}, and now it is to be measured; "
                f"give it again (--factor), {_WAYS_OUT}"
            )
        finished = has_results(run.trained)
        before = "" if run.eval_only else _recorded_config(run, finished)
        if not before:
            continue
        now = _config(run).dump()
        changes = (result_changes if finished else continuing_changes)(before, now)
        if run.select and finished:  # among which checkpoints it was chosen, and by what
            changes |= {k: v for k, v in differences(before, now).items() if k in _CHOICE}
        if run.arm in TIMED:  # its schedule is in the study's own file
            changes = {k: v for k, v in changes.items() if not k.startswith("SOLVER.")}
        if run.balance:  # it has what was measured then
            changes.pop(KEY, None)
        if run.before:  # the study may have been moved; `stages` checks what it starts from
            changes.pop("MODEL.WEIGHTS", None)
        if changes:
            raise UserError(
                f"{run}: {'finished' if finished else 'begun'} in {run.folder} with another config "
                f"({'; '.join(changes.values())}); {_WAYS_OUT}"
            )


def _recorded_config(run: Run, finished: bool) -> str:
    """That of its checkpoint; of a finished run without one that of config.yaml; "" if there is
    none: what has no checkpoint starts anew.
    """
    path = run.folder / "config.yaml"
    found = recorded(str(run.folder)).get("full_config", "")
    return found or (path.read_text() if finished and path.exists() else "")


def _config(run: Run) -> CfgNode:
    options = {"SEED": str(run.seed), **run.opts}
    return load_config(run.config_file, [word for pair in options.items() for word in pair])


def with_test_data(runs: Sequence[Run], cfg: CfgNode) -> List[Run]:
    """The runs; those that have begun know the test data of now, and so whose results count.

    Args:
        cfg: the study's.
    Raises:
        UserError: one has begun with other training data, or with another teacher, than is there
            now: its arm could not be compared with others.
    """
    known: Dict[str, Dict[str, dict]] = {}
    checked = []
    for run in runs:
        header = recorded(str(run.folder))
        if header or has_results(run):
            own = cfg.clone() if run.eval_only else _config(run)
            own.OUTPUT_DIR = str(run.folder)  # generated sets are there
            node = own.DATASETS.JSON
            stated = node.TRAIN and node.TEST and (node.VALID or not run.select)
            key = own.DATASETS.dump() + ("" if stated else own.OUTPUT_DIR)
            if key not in known:
                known[key] = {x: _digests(own, x) for x in ("TRAIN", "TEST", "VALID")}
            _check_data(run, header.get("data", {}), known[key]["TRAIN"], "training")
            if run.select:
                best = recorded(str(run.folder), BEST).get("best", {})
                _check_data(run, best, known[key]["VALID"], "validation")
            _check_teacher(run, header.get("teacher", {}).get("sha256"), own)
            run = run._replace(tested=known[key]["TEST"])
        checked.append(run)
    return checked


def _digests(cfg: CfgNode, split: str) -> Dict[str, str]:
    """As checkpoints and results have them; {} where the data are not there."""
    try:
        return describe_sets(image_sets(cfg, split))
    except UserError:
        return {}  # a run that needs them says so


def _check_data(run: Run, began: Dict[str, str], now: Dict[str, str], what: str) -> None:
    other = [key for key in began if key in now and now[key] != began[key]]
    if other:
        raise UserError(
            f"{run}: begun in {run.folder} with other {what} data than are there now "
            f"({' and '.join(other)} differ); bring them back, {_WAYS_OUT}"
        )


def _check_teacher(run: Run, taught: Optional[str], cfg: CfgNode) -> None:
    path = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS
    if taught and os.path.isfile(path) and weights_sha256(path) != taught:
        raise UserError(
            f"{run}: taught in {run.folder} by another teacher than {path} is now (SHA-256 "
            f"{taught[:8]}..., now {weights_sha256(path)[:8]}...); {_WAYS_OUT}"
        )
