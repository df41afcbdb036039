"""Evaluation while training: Detectron2's, on images as serving reads them, ended by a signal."""

import json
import os
from typing import Dict, Iterator, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from torch.utils.data import DataLoader

from .. import compat
from ..data.images import ImageMapper
from ..data.workers import supervise, supervised_batches
from ..errors import StoppedError, UserError
from ..files import atomic_write
from ..processes.stop import agreed, requested
from ..processes.together import on_main_process
from .results import read_results

SAME_AP = 0.05  # points


def build_test_loader(cfg: CfgNode, dataset_name: str) -> "StoppableLoader":
    """This process's share of the images of a registered set."""
    loader = build_detection_test_loader(cfg, dataset_name, mapper=ImageMapper(cfg, False))
    return StoppableLoader(supervise(loader, cfg.DATALOADER.TIMEOUT))


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
    """COCO's evaluator, or Pascal VOC's for sets registered as such."""
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
        evaluator = PascalVOCDetectionEvaluator(dataset_name)
    else:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluator = COCOEvaluator(
            dataset_name,
            tasks=_use_truth(dataset_name, folder, keypoints=cfg.MODEL.KEYPOINT_ON),
            output_dir=folder,
            use_fast_impl=compat.has_fast_coco_eval(),
        )
    return DatasetEvaluators([StopBeforeScoring(), evaluator])


def on_validation_set(cfg: CfgNode) -> CfgNode:
    """The config whose test set is DATASETS.VALID."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = cfg.DATASETS.VALID
    return cfg


def check_same_ap(found: dict, path: str) -> None:
    """Compare an evaluation with the results.json of the run that has those weights.

    Args:
        found: as results.json, None where there is no AP.
    Raises:
        UserError: there is no such file, or an AP differs by more than rounding can do on a GPU.
    """
    try:
        expected = average_precisions(read_results(path))
    except UserError as error:
        raise UserError(f"--starts-as: {error}") from None
    own = average_precisions(found)
    if not own or own.keys() != expected.keys():
        names = [", ".join(x) or "nothing" for x in (own, expected)]
        raise UserError(f"--starts-as {path}: evaluated are {names[0]} here, {names[1]} there")
    for name, value in own.items():
        if abs(value - expected[name]) > SAME_AP:
            raise UserError(
                f"--starts-as: this run starts with {name} {value:.2f}, but {path} says "
                f"{expected[name]:.2f}. Either MODEL.WEIGHTS is not that run's model_final.pth, "
                "something replaces it (MODEL.DISTILLER.INHERIT), or both are not tested alike"
            )


def average_precisions(results: dict, prefix: str = "") -> Dict[str, float]:
    """ "bbox AP" and so on of a results.json, with several sets "SET bbox AP"; none at all is 0."""
    found: Dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, dict):
            found.update(average_precisions(value, f"{prefix}{name} "))
        elif name == "AP":
            found[f"{prefix}AP"] = value or 0.0
    return found


def _use_truth(name: str, folder: str, *, keypoints: bool) -> Optional[Tuple[str, ...]]:
    """Let Detectron2 evaluate against `CocoFile.truth`, which is written to ``folder``.

    Returns:
        What can be evaluated; None for all that the model gives. Sets that are not read from a JSON
        of the user's are left as they are.
    """
    metadata = MetadataCatalog.get(name)
    found = metadata.get("coco_file")
    if found is None:
        return None
    path = os.path.join(folder, f"{name}_truth.json")
    os.makedirs(folder, exist_ok=True)

    def write() -> None:
        atomic_write(path, lambda file: file.write(json.dumps(found.truth()).encode()))

    on_main_process(write)
    if not os.path.exists(path):  # on a machine without the main one's disk
        write()
    vars(metadata).pop("json_file", None)  # of an evaluation into another folder
    metadata.json_file = path
    if all("segmentation" in entry for entry in found.annotations):
        return None
    return ("bbox", "keypoints") if keypoints else ("bbox",)


class StoppableLoader:
    """A loader whose iteration ends early when this process is asked to stop."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        read = 0
        awaited = lambda: f"test batch {read + 1} of {len(self)}"  # noqa: E731
        for batch in supervised_batches(self.loader, awaited):
            if requested():
                return
            read += 1
            yield batch


class StopBeforeScoring(DatasetEvaluator):
    """First of a set's evaluators: after the images, before any score, all processes agree.

    Their shares of the images differ, so an earlier agreement would have to wait for the slowest.

    Raises:
        StoppedError: from ``evaluate``, on all processes, if one of them is asked to stop.
    """

    def evaluate(self) -> None:
        name = agreed()
        if name:
            raise StoppedError(f"stopped by {name} during an evaluation")
