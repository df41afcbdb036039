"""The parts of a checkpoint that do not change during a run; they travel with the weights."""

from typing import Dict, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from fgd_inputs.image_contents import look_up, set_digest

from ..checkpoint_entries import FORMAT
from ..config import META_ARCHITECTURE, student_config
from ..data.contents import describe_names
from ..distillation.config import needs_teacher
from ..distillation.teacher import describe_teacher


def describe_run(cfg: CfgNode, unlabeled: Sequence[dict] = ()) -> dict:
    """What this process trains with; see `fgd.engine.checkpoint` for the entries.

    Args:
        cfg: of the run.  unlabeled: dataset dicts of the images without labels that it sees.
    """
    classes: List[str] = []
    if cfg.DATASETS.TRAIN:
        classes = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", []))
    return {
        "format": FORMAT,
        "checksum": "sha256",
        "config": student_config(cfg).dump(),
        "full_config": cfg.dump(),
        "classes": classes,
        "teacher": _describe_teacher(cfg),
        "data": _describe_data(cfg, unlabeled),
    }


def _describe_data(cfg: CfgNode, unlabeled: Sequence[dict]) -> Optional[Dict[str, str]]:
    names = list(cfg.DATASETS.TRAIN)
    if not names or not set(names) <= set(DatasetCatalog.list()):
        return None
    data = describe_names(names)
    if unlabeled:
        data["unlabeled"] = set_digest(look_up([record["file_name"] for record in unlabeled]))
    return data


def _describe_teacher(cfg: CfgNode) -> Optional[Dict[str, str]]:
    """What taught, so that a deployed student can be traced back to it; None: no teacher."""
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE or not needs_teacher(cfg):
        return None
    return describe_teacher(cfg)
