"""What processes must have been started with alike, on whatever machines they run."""

import hashlib
from typing import Dict, Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..data.contents import describe_names
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
    trained = header.get("data") or {}
    facts = {
        "the classes": str(header["classes"]),
        "the data of DATASETS.TRAIN": _short(trained),
        **describe_data(cfg, ("TEST", "VALID")),
    }
    facts["the teacher's file"] = (header["teacher"] or {}).get("sha256", "none")[:8]
    if "unlabeled" in trained:
        facts["the images without labels"] = trained["unlabeled"][:8]
    text = config_text(cfg) if header["teacher"] else ""
    if text:
        facts["the teacher's config"] = hashlib.sha256(text.encode()).hexdigest()[:8]
    if cfg.MODEL.WEIGHTS:
        facts["MODEL.WEIGHTS"] = weights_sha256(cfg.MODEL.WEIGHTS)[:8]
    return facts


def describe_data(
    cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST", "VALID")
) -> Dict[str, str]:
    """Digests of the registered datasets of the config, see `fgd.data.contents.describe_sets`."""
    return {
        f"the data of DATASETS.{split}": _short(
            describe_names([name for name in cfg.DATASETS[split] if name in DatasetCatalog.list()])
        )
        for split in splits
        if cfg.DATASETS[split]
    }


def _short(data: Mapping[str, str]) -> str:
    text = f"{data.get('annotations')} {data.get('images')}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]
