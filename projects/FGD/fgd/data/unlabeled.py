"""Images without labels: which there are, and how many of them a training batch has.

What is on them is unknown. They are no images without objects: none has a detection loss.
"""

import logging
import os
from typing import Dict, List

from detectron2.config import CfgNode

from fgd_inputs.file_names import find_images
from fgd_inputs.image_contents import equal_files, look_up
from fgd_inputs.names import one_line

from ..errors import UserError
from .contents import registered_set

FOLDER = "DATASETS.JSON.UNLABELED_IMAGES"
COUNT = "DATALOADER.UNLABELED_PER_BATCH"
MARK = "unlabeled"  # what a sample of them is known by

logger = logging.getLogger(__name__)


def add_unlabeled_config(cfg: CfgNode) -> None:
    """Add DATASETS.JSON.UNLABELED_IMAGES and DATALOADER.UNLABELED_PER_BATCH, in place."""
    # Folder of images without labels, for distillation alone. Those that are in the training set
    # too, by their content, are left out; test images are refused. "" = none.
    cfg.DATASETS.JSON.UNLABELED_IMAGES = ""
    # How many of them a batch has beside its SOLVER.IMS_PER_BATCH labelled images, on all
    # processes together.
    cfg.DATALOADER.UNLABELED_PER_BATCH = 0


def check_unlabeled(cfg: CfgNode) -> None:
    """Raise UserError if one of the two keys is set without the other, or means nothing."""
    folder, count = cfg.DATASETS.JSON.UNLABELED_IMAGES, cfg.DATALOADER.UNLABELED_PER_BATCH
    if count < 0:
        raise UserError(f"{COUNT}: {count} is below 0")
    if count and not folder:
        raise UserError(f"{COUNT}: {count}, but {FOLDER} names no folder")
    if folder and not count:
        raise UserError(f"{FOLDER}: {folder}, but {COUNT} is 0; set how many a batch has")


def unlabeled_records(cfg: CfgNode) -> List[Dict[str, str]]:
    """Dataset dicts of the folder's images, in the order of their names, each with its file alone.

    Args:
        cfg: with registered datasets.
    Raises:
        UserError: no folder, no image is left, or one is a test image; names the first.
    """
    folder = os.path.abspath(os.path.expanduser(cfg.DATASETS.JSON.UNLABELED_IMAGES))
    if not os.path.isdir(folder):
        raise UserError(f"{FOLDER}: there is no folder {folder}")
    try:
        files = [str(path) for path in find_images([folder])]
    except (UserError, OSError) as error:
        raise UserError(f"{FOLDER}: {error}") from None
    there = look_up(files)
    tested, trained = (_files(cfg.DATASETS[split]) for split in ("TEST", "TRAIN"))
    same = equal_files(there, look_up(tested))
    if same:
        first = next(iter(same))
        raise UserError(
            f"{FOLDER}: {len(same)} of {len(files)} images are test images (the first: "
            f"{one_line(files[first])} is {one_line(tested[same[first]])}); take them out, since "
            "AP on images that were trained on says little of others"
        )
    known = equal_files(there, look_up(trained))
    left = [{"file_name": file} for i, file in enumerate(files) if i not in known]
    if not left:
        raise UserError(f"{FOLDER}: all {len(files)} images of {folder} are in the training set")
    logger.info(
        f"{len(left)} images without labels in {folder}; {len(known)} are in the training set and "
        "left out"
    )
    return left


def _files(names) -> List[str]:
    return [path for name in names for path in registered_set(name).files]
