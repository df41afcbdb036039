"""SOLVER.KEEP_BEST: the checkpoint of the best evaluation of a run, model_best.pth."""

import logging
import math
import os
from typing import List, Mapping, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..data.contents import describe_names
from ..errors import UserError
from ..processes.together import on_main_process
from ..weights import read_weights
from .checkpoint import Resumed, TrainingCheckpointer
from .hooks import unsaved
from .results import BEST

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

logger = logging.getLogger(__name__)


def chosen_by(cfg: CfgNode) -> tuple:
    """Names of the sets that a checkpoint is chosen by: DATASETS.VALID, or DATASETS.TEST."""
    return tuple(cfg.DATASETS.VALID or cfg.DATASETS.TEST)


def metric_names(cfg: CfgNode) -> List[str]:
    """What an evaluation of the config may give, as in metrics.json, such as "bbox/AP".

    Args:
        cfg: with registered datasets.
    """
    names, sets = [], chosen_by(cfg)
    for each in sets:
        metadata = MetadataCatalog.get(each)
        if metadata.get("evaluator_type") == "pascal_voc":
            found = [f"bbox/{metric}" for metric in _METRICS[:3]]
        else:
            kinds = ["bbox"] + ["segm"] * cfg.MODEL.MASK_ON + ["keypoints"] * cfg.MODEL.KEYPOINT_ON
            classes = metadata.get("thing_classes") or []
            single = [f"AP-{name}" for name in classes] if len(classes) > 1 else []
            found = [f"{kind}/{metric}" for kind in kinds for metric in (*_METRICS, *single)]
            found = [name for name in found if name != "keypoints/APs"]
        names += [f"{each}/{name}" if len(sets) > 1 else name for name in found]
    return names


def check_metric(cfg: CfgNode) -> None:
    """Raise UserError if SOLVER.KEEP_BEST names what no evaluation gives; warn of a choice by test.

    Args:
        cfg: with registered datasets.
    """
    metric = cfg.SOLVER.KEEP_BEST
    if not metric:
        return
    names = metric_names(cfg)
    if metric not in names:
        raise UserError(f"SOLVER.KEEP_BEST: {metric!r} is none of {', '.join(names)}")
    if not cfg.DATASETS.VALID and comm.is_main_process():
        logger.warning(
            "SOLVER.KEEP_BEST chooses by DATASETS.TEST, the set that final figures are reported "
            f"on, so the figure of {BEST} is too good; DATASETS.JSON.VALID names a validation set"
        )


class KeepBest:
    """Saves `BEST` whenever an evaluation is better than all before it; nothing without a metric.

    The file is the only record, so what it says and what it holds cannot differ.
    """

    def __init__(self, cfg: CfgNode, checkpointer: TrainingCheckpointer):
        self.metric, self.sets = cfg.SOLVER.KEEP_BEST, chosen_by(cfg)
        self.ignore_errors = cfg.SOLVER.IGNORE_SAVE_ERRORS
        self.checkpointer = checkpointer
        self.path = os.path.join(checkpointer.save_dir, BEST)
        self.figure: Optional[float] = None

    def resume(self, resumed: Resumed) -> None:
        """Remember the best of a run that goes on."""
        if self.metric:
            self.figure = on_main_process(lambda: self._known(resumed))

    def consider(self, results: Mapping, iteration: int) -> None:
        """Take an evaluation into account. All processes call it together.

        Args:
            results: as the trainer's ``test`` returns them, in the main process.
            iteration: index of the last finished one.
        Raises:
            UserError: the metric is not among them; or as `TrainingCheckpointer.save`.
        """
        if not self.metric:
            return
        record = on_main_process(lambda: self._better(results, iteration))
        if record is None:
            return
        with unsaved(ignored=self.ignore_errors):
            self.checkpointer.save_best(record)
            self.figure = record["figure"]
            self._say(record)

    def _better(self, results: Mapping, iteration: int) -> Optional[dict]:
        """The record of `BEST` if these results are the best so far."""
        found = flatten_results_dict(results)
        if self.metric not in found:
            raise UserError(
                f"SOLVER.KEEP_BEST: the evaluation gave no {self.metric}, only "
                f"{', '.join(found) or 'nothing'}; set one of these, and continue with --resume"
            )
        figure = float(found[self.metric])
        if not math.isfinite(figure):
            logger.info(f"SOLVER.KEEP_BEST: {self.metric} is undefined at iteration {iteration}")
            return None
        if self.figure is not None and figure <= self.figure:
            return None
        record = {"metric": self.metric, "figure": figure, "iteration": iteration}
        return {**record, **describe_names(self.sets)}

    def _known(self, resumed: Resumed) -> Optional[float]:
        if not os.path.exists(self.path):
            return None
        try:
            record = read_weights(self.path).get("best") or {}
        except UserError as error:
            logger.warning(f"SOLVER.KEEP_BEST: the best so far is not known: {error}")
            return None
        own = {"metric": self.metric, **describe_names(self.sets)}
        other = [key for key, value in own.items() if record.get(key) != value]
        if resumed.changed and record.get("iteration", -1) > resumed.iteration:
            other.append("training")
        if other:
            logger.warning(
                f"SOLVER.KEEP_BEST: {self.path} is of another evaluation or training "
                f"({' and '.join(other)} differ); the next evaluation replaces it"
            )
            return None
        self._say(record)
        return record["figure"]

    def _say(self, record: dict) -> None:
        count = record["iteration"] + 1
        logger.info(f"{BEST}: {self.metric} {record['figure']:.4f} after {count} iterations")
