"""What processes must have been started with alike, on whatever machines they run."""

import hashlib
from typing import Dict, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..data.contents import describe_sets, registered_set
from ..distillation.teacher import config_text
from ..weights import weights_sha256
from ..yaml_config import leaves

# Where a machine has its files, and how many workers read them. The content is compared instead.
_OWN = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.DISTILLER.TEACHER.WEIGHTS",
    "MODEL.DISTILLER.TEACHER.CONFIG_FILE",
    "DATASETS.JSON.TRAIN",
    "DATASETS.JSON.TEST",
    "DATASETS.JSON.VALID",
    "DATASETS.JSON.TRAIN_IMAGES",
    "DATASETS.JSON.TEST_IMAGES",
    "DATASETS.JSON.VALID_IMAGES",
    "DATASETS.JSON.UNLABELED_IMAGES",
    "DATASETS.TRAIN_SECOND_IMAGES",
    "DATASETS.SHAPES.ROOT",
    "DATALOADER.NUM_WORKERS",
)


def shared_values(cfg: CfgNode) -> Dict[str, str]:
    """Key → value of a config as the user gave it, without the places of files."""
    return {key: str(value) for key, value in leaves(cfg) if key not in _OWN}


def describe_start(cfg: CfgNode, header: dict) -> Dict[str, str]:
    """Digests of what a training reads.

    Args:
        cfg: with registered datasets.  header: what `describe_run` says of the run.
    Raises:
        UserError: the teacher's config cannot be read.
    """
    facts = {"the classes": str(header["classes"]), **describe_data(cfg)}
    facts["the teacher's file"] = (header["teacher"] or {}).get("sha256", "none")[:8]
    unlabeled = (header.get("data") or {}).get("unlabeled")
    if unlabeled:
        facts["the images without labels"] = unlabeled[:8]
    text = config_text(cfg) if header["teacher"] else ""
    if text:
        facts["the teacher's config"] = hashlib.sha256(text.encode()).hexdigest()[:8]
    if cfg.MODEL.WEIGHTS:
        facts["MODEL.WEIGHTS"] = weights_sha256(cfg.MODEL.WEIGHTS)[:8]
    return facts


def describe_data(cfg: CfgNode) -> Dict[str, str]:
    """Digests of the registered datasets of the config, see `fgd.data.contents.describe_sets`."""
    return {
        f"the data of DATASETS.{split}": _digest(cfg.DATASETS[split])
        for split in ("TRAIN", "TEST", "VALID")
        if cfg.DATASETS[split]
    }


def _digest(names: Sequence[str]) -> str:
    sets = [registered_set(name) for name in names if name in DatasetCatalog.list()]
    facts = describe_sets(sets)
    return hashlib.sha256(f"{facts['annotations']} {facts['images']}".encode()).hexdigest()[:8]
