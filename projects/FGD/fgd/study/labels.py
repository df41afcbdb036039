"""Arms of pictures without labels: `pseudo`, `pseudo+distil` and `unlabeled`."""

import os
from typing import Dict, List, NamedTuple, Optional, Sequence

from detectron2.config import CfgNode

from fgd_inputs.json_file import number, read_json
from fgd_inputs.names import one_line

from ..data.unlabeled import COUNT, FOLDER
from ..errors import UserError

PSEUDO, BOTH, UNLABELED = "pseudo", "pseudo+distil", "unlabeled"
# What the config has of images without labels counts in the arm UNLABELED alone.
_OFF = {FOLDER: "", COUNT: "0", "MODEL.DISTILLER.PSEUDO_BOXES": "0.0"}


class LabelFile(NamedTuple):
    """The file that the arms `pseudo` and `pseudo+distil` are trained on; "" = there is none."""

    path: str = ""
    folder: str = ""  # of its images
    said: str = ""  # by whom its boxes are, and how long that took
    seconds: Optional[float] = None  # that took; None = unknown


NO_LABELS = LabelFile()


def read_labels(path: str, arms: Sequence[str]) -> LabelFile:
    """What --labels names: a COCO JSON, by deploy/label.py or another.

    Raises:
        UserError: it cannot be read; an arm needs it, or none does.
    """
    wanted = [arm for arm in (PSEUDO, BOTH) if arm in arms]
    if wanted and not path:
        raise UserError(f"--arms: {wanted[0]} needs --labels, a file of deploy/label.py")
    if not wanted:
        if path:
            raise UserError(f"--labels: no arm uses it; add {PSEUDO} or {BOTH} to --arms")
        return NO_LABELS
    content = read_json(path, "--labels")
    info = content.get("info") if isinstance(content, dict) else None
    info = info if isinstance(info, dict) else {}
    folder, teacher, seconds = info.get("images"), info.get("teacher"), number(info.get("seconds"))
    said = f"{PSEUDO}: labels of {path}"
    if isinstance(teacher, dict):
        said += f" by {teacher.get('file')} (SHA-256 {str(teacher.get('sha256'))[:8]}...)"
    took = "an unknown time" if seconds is None else f"{seconds:.0f} s"
    said += f"; to make them took {took}, which is in no arm's step time."
    known = isinstance(folder, str)
    return LabelFile(os.path.abspath(path), folder if known else "", one_line(said), seconds)


def label_changes(arm: str, cfg: CfgNode, labels: LabelFile) -> Dict[str, str]:
    """The options of an arm that say on which pictures it is trained."""
    off = cfg.DATALOADER.UNLABELED_PER_BATCH and arm != UNLABELED
    found = dict(_OFF) if off else {}
    if arm in (PSEUDO, BOTH):
        found["DATASETS.JSON.TRAIN"] = labels.path
        found["DATASETS.JSON.TRAIN_IMAGES"] = labels.folder
        found["DATASETS.JSON.TRAIN_LIMIT"] = "0"
    return found


def check_unlabeled_arm(arms: Sequence[str], cfg: CfgNode) -> None:
    """UserError if the config has no images for it."""
    if UNLABELED in arms and not cfg.DATALOADER.UNLABELED_PER_BATCH:
        raise UserError(f"--arms: {UNLABELED} needs {FOLDER} and {COUNT} in the config")


def label_facts(arms: Sequence[str], cfg: CfgNode, labels: LabelFile) -> List[str]:
    """What sets these arms apart, for the page."""
    lines = [labels.said] if labels.said else []
    if UNLABELED in arms:
        lines.append(
            f"{UNLABELED}: {cfg.DATALOADER.UNLABELED_PER_BATCH} images of "
            f"{one_line(cfg.DATASETS.JSON.UNLABELED_IMAGES)} beside each batch, which no other arm "
            "has; its steps take longer for it."
        )
    return lines
