"""Evaluation while training: Detectron2's, on images as serving reads them, ended by a signal."""

import os
from typing import Iterator

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
from ..errors import StoppedError
from ..processes.stop import agreed, requested


def build_test_loader(cfg: CfgNode, dataset_name: str) -> "StoppableLoader":
    """This process's share of the images of a registered set."""
    loader = build_detection_test_loader(cfg, dataset_name, mapper=ImageMapper(cfg, False))
    return StoppableLoader(supervise(loader, cfg.DATALOADER.TIMEOUT))


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
    """COCO's evaluator, or Pascal VOC's for sets registered as such."""
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
        evaluator = PascalVOCDetectionEvaluator(dataset_name)
    else:
        evaluator = COCOEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            use_fast_impl=compat.has_fast_coco_eval(),
        )
    return DatasetEvaluators([StopBeforeScoring(), evaluator])


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
