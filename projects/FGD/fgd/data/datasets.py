"""Datasets by config keys alone: any COCO-format JSON + image folder, or generated shapes."""

import dataclasses
import difflib
import logging
import os
import re
from pathlib import Path
from typing import List

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager

from fgd_inputs.json_file import read_json

from ..errors import UserError
from ..processes.together import on_main_process
from .contents import ImageSet, registered_set
from .drawing import ShapesSettings
from .json_sets import json_images, register_json
from .shapes import generate

__all__ = [
    "add_data_config",
    "coco_ground_truth",
    "image_sets",
    "register_from_config",
    "test_dataset",
]

logger = logging.getLogger(__name__)

_SHAPES_NAME = re.compile(r"shapes_(train|test)(_[0-9a-f]{8})?")


def add_data_config(cfg: CfgNode) -> None:
    """Add DATASETS.JSON and DATASETS.SHAPES, which `register_from_config` acts on, and what to do
    with bad images, which `fgd.data.stream` does.

    A config that names no data gets the generated shapes.
    """
    cfg.DATASETS.TRAIN = tuple(cfg.DATASETS.TRAIN) or ("shapes_train",)
    cfg.DATASETS.TEST = tuple(cfg.DATASETS.TEST) or ("shapes_test",)
    # If named, what is evaluated while training (TEST.EVAL_PERIOD), logged as "valid/...", and what
    # SOLVER.KEEP_BEST chooses by. DATASETS.TEST is then evaluated at the end only.
    cfg.DATASETS.VALID = ()
    node = cfg.DATASETS.JSON = type(cfg)()
    # COCO-format files. When set they become DATASETS.TRAIN / TEST / VALID. "" = unused.
    node.TRAIN = ""
    node.TEST = ""
    node.VALID = ""
    # Image folders. "" = "images" beside the JSON or one folder up, else the JSON's own folder.
    node.TRAIN_IMAGES = ""
    node.TEST_IMAGES = ""
    node.VALID_IMAGES = ""
    # Train on so many images, evenly spaced in the order of their ids; 0 = all. For studies of
    # few labels: every arm and seed gets the same images.
    node.TRAIN_LIMIT = 0

    # What to do with a training image that is missing, damaged, not of the size that the JSON says,
    # or not 8 bits per channel: "error" = stop and name it; "skip" = log it and train on the next
    # one of its orientation instead. Test images are never skipped: it would change the metrics.
    cfg.DATALOADER.BAD_IMAGES = "error"
    # How many different images each process may skip; one more is an error.
    cfg.DATALOADER.MAX_BAD_IMAGES = 10
    # Seconds that workers (DATALOADER.NUM_WORKERS > 0) may take to give a batch that is waited
    # for; then the run ends and names its images. 0 = wait for ever.
    cfg.DATALOADER.TIMEOUT = 300.0

    # The generated set that "shapes_train" / "shapes_test" in DATASETS.TRAIN / TEST stand for.
    # Meaning, unit and range of each setting: fgd.data.drawing.ShapesSettings.
    node = cfg.DATASETS.SHAPES = type(cfg)()
    node.ROOT = ""  # folder; "" = OUTPUT_DIR/shapes. Sets of other settings live side by side.
    node.TRAIN_IMAGES = 1000
    node.TEST_IMAGES = 200
    for field in dataclasses.fields(ShapesSettings):
        if field.name not in ("images", "split"):
            node[field.name.upper()] = field.default


def register_from_config(cfg: CfgNode, splits=("TRAIN", "TEST", "VALID")) -> CfgNode:
    """Make the datasets of the config usable; call it in each process, as often as you like.

    Generated shapes are written by the main process first. Boxes that no detector can use are
    left out, counted in the log and listed in OUTPUT_DIR/data_report.json. With MODEL.MASK_ON each
    of the other boxes must have a mask.

    Args:
        splits: ("TEST",) leaves DATASETS.TRAIN as it is, for evaluation without training data.
    Returns:
        A clone whose DATASETS.TRAIN, TEST and VALID name registered datasets. The names of JSON
        sets hold a digest of file and folder, so two sets never share one.
    Raises:
        UserError: a file or folder is missing or empty, is not COCO format, a mask is missing or
            not in INPUT.MASK_FORMAT, or a name is unknown. Raised by all processes, also when only
            the main one met it.
    """
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    json_cfg = cfg.DATASETS.JSON
    for split in splits:
        if json_cfg[split]:
            name = register_json(json_cfg[split], json_cfg[f"{split}_IMAGES"], cfg, split)
            cfg.DATASETS[split] = (name,)
        else:
            cfg.DATASETS[split] = tuple(_resolve(name, cfg) for name in cfg.DATASETS[split])
    if frozen:
        cfg.freeze()
    return cfg


def image_sets(cfg: CfgNode, split: str) -> List[ImageSet]:
    """The sets of DATASETS.TRAIN, TEST or VALID, without the annotations of a user's JSON.

    Raises:
        UserError: as `register_from_config`.
    """
    node = cfg.DATASETS.JSON
    if node[split]:
        limit = node.TRAIN_LIMIT if split == "TRAIN" else 0
        return [json_images(node[split], node[f"{split}_IMAGES"], limit)]
    names = register_from_config(cfg, (split,)).DATASETS[split]
    return [registered_set(name) for name in names]


def _resolve(name: str, cfg: CfgNode) -> str:
    """A name of DATASETS.TRAIN / TEST -> a registered name whose files are there."""
    match = _SHAPES_NAME.fullmatch(name)
    if match:
        return _register_shapes(match[1], cfg)
    return _check_registered(name)


def _check_registered(name: str) -> str:
    root = os.environ.get("DETECTRON2_DATASETS", "not set, so ./datasets")
    if name not in DatasetCatalog.list():
        similar = ", ".join(difflib.get_close_matches(name, DatasetCatalog.list())) or "none"
        raise UserError(
            f"dataset {name!r} is not registered (similar: {similar}). For your own files set "
            "DATASETS.JSON.TRAIN and DATASETS.JSON.TEST"
        )
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root"):
        path = metadata.get(key)
        # A path with a scheme is fetched by Detectron2 when it is read.
        if path and "://" not in path and not os.path.exists(path):
            raise UserError(
                f"dataset {name!r}: {path} does not exist (DETECTRON2_DATASETS is {root})"
            )
    return name


def _register_shapes(split: str, cfg: CfgNode) -> str:
    node = cfg.DATASETS.SHAPES
    values = {key.lower(): value for key, value in node.items()}
    images = {"train": values.pop("train_images"), "test": values.pop("test_images")}
    root = Path(values.pop("root") or os.path.join(cfg.OUTPUT_DIR, "shapes"))
    settings = ShapesSettings(images=images[split], split=int(split == "test"), **values)
    folder = root / f"{split}-{settings.digest}"
    on_main_process(lambda: generate(folder, settings))
    # Every process now finds the files, or, on a machine without shared disk, writes its own.
    path = str(generate(folder, settings))
    return register_json(path, "", cfg, split.upper(), prefix=f"shapes_{split}")


def test_dataset(spec: str, images: str | None = None) -> str:
    """Registered name of what a command line calls a dataset.

    Args:
        spec: a registered name, or the path of a COCO-format JSON.
        images: image folder of a JSON; None or "" = as DATASETS.JSON.TEST_IMAGES "".
    Raises:
        UserError: neither, or as `register_from_config`.
    """
    if spec in DatasetCatalog.list():
        return _check_registered(spec)
    if not (spec.endswith(".json") or os.path.exists(spec)):
        _check_registered(spec)  # raises, with similar names
    return register_json(spec, images or "")


test_dataset.__test__ = False  # its name makes pytest take it for a test


def coco_ground_truth(name: str) -> dict:
    """The dataset as a COCO dict with every key that pycocotools' evaluation reads.

    Of a JSON of the user's that is `CocoFile.truth`; of other sets the file that they name, or what
    Detectron2 makes of the loaded set.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("coco_file") is not None:
        return metadata.coco_file.truth()
    if metadata.get("json_file"):
        return read_json(PathManager.get_local_path(metadata.json_file), "dataset JSON")
    return {"annotations": [], **convert_to_coco_dict(name)}
