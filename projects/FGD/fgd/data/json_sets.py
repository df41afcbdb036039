"""A COCO-format JSON as a dataset of Detectron2, registered under a name of its own."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from pycocotools import mask as mask_utils

from fgd_inputs.coco import CocoFile, read_coco, read_test_set
from fgd_inputs.coco_masks import MASK_FORMATS
from fgd_inputs.file_names import image_folder
from fgd_inputs.json_file import read_json

from ..errors import UserError
from ..files import atomic_write, file_sha256
from .contents import ImageSet, chosen_images

__all__ = ["json_images", "records", "register_json"]

logger = logging.getLogger(__name__)


def register_json(
    json_file: str,
    images: str,
    cfg: Optional[CfgNode] = None,
    split: str = "TEST",
    prefix: str = "",
) -> str:
    """Check and register one JSON under a name that belongs to it alone.

    Args:
        cfg: None for boxes only. split: "TRAIN", "TEST" or "VALID".
        prefix: of the name, "" = the file's.
    """
    json_file = os.path.abspath(os.path.expanduser(json_file))
    folder = image_folder(json_file, images)
    limit = cfg.DATASETS.JSON.TRAIN_LIMIT if cfg is not None and split == "TRAIN" else 0
    if limit < 0:
        raise UserError(f"DATASETS.JSON.TRAIN_LIMIT is {limit}; expected a number of images or 0")
    wanted = _wanted(cfg, split)
    digest, annotations = _digests(json_file, folder, limit, wanted)
    name = f"{prefix or Path(json_file).stem}_{digest}"
    if name in DatasetCatalog.list():
        return name
    hint = f"set DATASETS.JSON.{split}_IMAGES to the folder that file names are relative to"
    if split == "TRAIN":
        found = read_coco(json_file, folder, hint=hint, **wanted)
        found.check_boxes()
    else:
        found = read_test_set(json_file, folder, hint=hint, **wanted)
    DatasetCatalog.register(name, lambda: records(found, limit))
    ids = found.category_ids
    MetadataCatalog.get(name).set(
        thing_classes=found.class_names,
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(ids)},
        image_root=folder,
        evaluator_type="coco",
        coco_file=found,
        image_set=ImageSet(annotations, [x["file"] for x in chosen_images(found, limit)]),
    )
    _report(name, json_file, found, cfg)
    return name


def json_images(json_file: str, images: str, limit: int = 0) -> ImageSet:
    """The images of a JSON whose annotations are not read; arguments as `register_json`'s keys."""
    json_file = os.path.abspath(os.path.expanduser(json_file))
    found = read_coco(json_file, image_folder(json_file, images), annotated=False)
    return ImageSet(file_sha256(json_file), [x["file"] for x in chosen_images(found, limit)])


def _wanted(cfg: Optional[CfgNode], split: str) -> dict:
    """What a set is read for, as `read_coco` takes it for training and `read_test_set` else."""
    if cfg is None:
        return {"masks": False, "keypoints": False}
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT not in MASK_FORMATS:
        raise UserError(
            f"INPUT.MASK_FORMAT: {cfg.INPUT.MASK_FORMAT!r} is neither 'polygon' nor 'bitmask'"
        )
    masks = cfg.MODEL.MASK_ON
    if split == "TRAIN":
        masks = cfg.INPUT.MASK_FORMAT if masks else ""
    return {"masks": masks, "keypoints": cfg.MODEL.KEYPOINT_ON}


def records(found: CocoFile, limit: int = 0) -> List[dict]:
    """Detectron2 dataset dicts, in the order of image ids.

    Args:
        limit: take so many images, evenly spaced; 0 = all.
    """
    labels = {c: i for i, c in enumerate(found.category_ids)}
    by_image: Dict[Any, List[dict]] = {image["id"]: [] for image in found.images}
    for entry in found.annotations:
        by_image[entry["image_id"]].append(_annotation(entry, labels))
    return [
        {
            "file_name": image["file"],
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": by_image[image["id"]],
        }
        for image in chosen_images(found, limit)
    ]


def _annotation(entry: dict, labels: Dict[Any, int]) -> dict:
    read = {
        "bbox": entry["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": labels[entry["category_id"]],
        "iscrowd": entry["iscrowd"],
    }
    mask = entry.get("segmentation")
    if mask is not None:
        if isinstance(mask, dict) and isinstance(mask["counts"], list):
            mask = mask_utils.frPyObjects(mask, *mask["size"])  # uncompressed RLE
        read["segmentation"] = mask
    if "keypoints" in entry:
        # COCO's are indices of pixels, Detectron2's lie at their centres.
        points = entry["keypoints"]
        read["keypoints"] = [x if i % 3 == 2 else x + 0.5 for i, x in enumerate(points)]
    return read


def _digests(json_file: str, folder: str, limit: int, wanted: dict) -> Tuple[str, str]:
    """Eight hex digits of the file's content, where it is, and how it is read; its SHA-256."""
    how = f"{json_file}\n{folder}\n{limit}\n{wanted['masks']}"
    how += "\nkeypoints" if wanted["keypoints"] else ""
    digest, content = hashlib.sha256(how.encode()), hashlib.sha256()
    try:
        with open(json_file, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                content.update(block)
    except OSError as error:
        raise UserError(f"dataset JSON {json_file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:8], content.hexdigest()


def _report(name: str, json_file: str, found: CocoFile, cfg: Optional[CfgNode]) -> None:
    """Log what was found; list dropped boxes in OUTPUT_DIR/data_report.json (main process)."""
    logger.info(f"{name}: {found.counted()} from {json_file}")
    for note in found.notes:
        logger.info(f"{name}: {note}")
    for warning in found.warnings:
        logger.warning(f"{name}: {warning}")
    if not found.dropped:
        return
    logger.warning(f"{name}: {found.dropped_text()} of {json_file}")
    if cfg is not None and comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "data_report.json")
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        report = {**_earlier_report(path), name: {"json": json_file, "dropped": found.dropped}}
        text = json.dumps(report, indent=1)
        atomic_write(path, lambda file: file.write(text.encode()))


def _earlier_report(path: str) -> dict:
    """Of the other set, or of an earlier start; one that cannot be read counts for nothing."""
    try:
        report = read_json(path, "report")
    except UserError:
        return {}
    return report if isinstance(report, dict) else {}
