"""Datasets by config keys alone: any COCO-format JSON + image folder, or generated shapes."""

import dataclasses
import difflib
import hashlib
import json
import logging
import os
import re
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils import comm

from ..errors import UserError
from ..processes.together import on_main_process
from .coco_json import CocoSummary, bad_box, summarize
from .coco_masks import MASK_FORMATS
from .drawing import ShapesSettings
from .shapes import generate

__all__ = ["add_data_config", "coco_ground_truth", "register_from_config", "test_dataset"]

logger = logging.getLogger(__name__)

_SHAPES_NAME = re.compile(r"shapes_(train|test)(_[0-9a-f]{8})?")


def add_data_config(cfg: CfgNode) -> None:
    """Add DATASETS.JSON and DATASETS.SHAPES, which `register_from_config` acts on, and what to do
    with bad images, which `fgd.data.stream` does.

    A config that names no data gets the generated shapes.
    """
    cfg.DATASETS.TRAIN = tuple(cfg.DATASETS.TRAIN) or ("shapes_train",)
    cfg.DATASETS.TEST = tuple(cfg.DATASETS.TEST) or ("shapes_test",)
    node = cfg.DATASETS.JSON = type(cfg)()
    # COCO-format files. When set they become DATASETS.TRAIN / DATASETS.TEST. "" = unused.
    node.TRAIN = ""
    node.TEST = ""
    # Image folders. "" = "images" beside the JSON or one folder up, else the JSON's own folder.
    node.TRAIN_IMAGES = ""
    node.TEST_IMAGES = ""
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


def register_from_config(cfg: CfgNode, splits=("TRAIN", "TEST")) -> CfgNode:
    """Make the datasets of the config usable; call it in each process, as often as you like.

    Generated shapes are written by the main process first. Boxes that no detector can use are
    left out, counted in the log and listed in OUTPUT_DIR/data_report.json. With MODEL.MASK_ON each
    of the other boxes must have a mask.

    Args:
        splits: ("TEST",) leaves DATASETS.TRAIN as it is, for evaluation without training data.
    Returns:
        A clone whose DATASETS.TRAIN and TEST name registered datasets. The names of JSON sets hold
        a digest of file and folder, so two sets never share one.
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
            limit = json_cfg.TRAIN_LIMIT if split == "TRAIN" else 0
            images, masks = json_cfg[f"{split}_IMAGES"], _mask_format(cfg, split)
            name = _register_json(json_cfg[split], images, cfg, limit, masks=masks)
            cfg.DATASETS[split] = (name,)
        else:
            cfg.DATASETS[split] = tuple(_resolve(name, cfg) for name in cfg.DATASETS[split])
    if frozen:
        cfg.freeze()
    return cfg


def _mask_format(cfg: CfgNode, split: str) -> str:
    """What masks of a split must be: INPUT.MASK_FORMAT for training, any to evaluate, "" none."""
    if not cfg.MODEL.MASK_ON:
        return ""
    if cfg.INPUT.MASK_FORMAT not in MASK_FORMATS:
        raise UserError(
            f"INPUT.MASK_FORMAT: {cfg.INPUT.MASK_FORMAT!r} is neither 'polygon' nor 'bitmask'"
        )
    return cfg.INPUT.MASK_FORMAT if split == "TRAIN" else "bitmask"


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
    return _register_json(str(generate(folder, settings)), "", cfg, prefix=f"shapes_{split}")


def _image_root(json_file: str, images: str) -> str:
    if images:
        return os.path.abspath(os.path.expanduser(images))
    folder = os.path.dirname(json_file)
    # Beside the JSON, or beside the folder "annotations" that it is in.
    usual = [os.path.join(parent, "images") for parent in (folder, os.path.dirname(folder))]
    return next((path for path in usual if os.path.isdir(path)), folder)


def _register_json(
    json_file: str, images: str, cfg=None, limit: int = 0, prefix: str = "", masks: str = ""
) -> str:
    """Check and register one JSON under a name that belongs to it alone.

    Args:
        masks: the mask format to check it for; "" = boxes only.
    """
    json_file = os.path.abspath(os.path.expanduser(json_file))
    image_root = _image_root(json_file, images)
    if limit < 0:
        raise UserError(f"DATASETS.JSON.TRAIN_LIMIT is {limit}; expected a number of images or 0")
    name = f"{prefix or Path(json_file).stem}_{_digest(json_file, image_root, limit, masks)}"
    if name in DatasetCatalog.list():
        return name
    summary = summarize(json_file, image_root, masks)
    DatasetCatalog.register(name, lambda: _load(json_file, image_root, name, limit))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        thing_classes=summary.class_names,
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(summary.category_ids)},
        image_root=image_root,
        evaluator_type="coco",
    )
    # Without json_file, Detectron2's COCO evaluator takes the ground truth from the loaded dataset,
    # which is right for a subset, dropped boxes, and files without "area" or "iscrowd".
    if summary.complete and not limit:
        metadata.json_file = json_file
    _report(name, json_file, summary, cfg)
    return name


def _digest(json_file: str, image_root: str, limit: int, masks: str) -> str:
    """Eight hex digits of the file's content, where it is, and how it is read."""
    digest = hashlib.sha256(f"{json_file}\n{image_root}\n{limit}\n{masks}".encode())
    try:
        with open(json_file, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"dataset JSON {json_file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:8]


def _load(json_file: str, image_root: str, name: str, limit: int) -> list[dict]:
    """Detectron2 dataset dicts, in the order of image ids, without the unusable boxes."""
    records = load_coco_json(json_file, image_root, name)
    if 0 < limit < len(records):
        records = [records[i * len(records) // limit] for i in range(limit)]
    for record in records:
        record["annotations"] = [
            annotation
            for annotation in record["annotations"]
            if bad_box(annotation["bbox"], record["height"], record["width"]) is None
        ]
    return records


def _report(name: str, json_file: str, summary: CocoSummary, cfg) -> None:
    """Log what was found; list dropped boxes in OUTPUT_DIR/data_report.json (main process)."""
    logger.info(f"{name}: {summary.images} images, {summary.boxes} boxes from {json_file}")
    if not summary.dropped:
        return
    logger.warning(f"{name}: {summary.dropped_text()} of {json_file}")
    if cfg is not None and comm.is_main_process():
        path = Path(cfg.OUTPUT_DIR, "data_report.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        report = json.loads(path.read_text()) if path.exists() else {}
        report[name] = {"json": json_file, "dropped": summary.dropped}
        path.write_text(json.dumps(report, indent=1))


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
    return _register_json(spec, images or "")


test_dataset.__test__ = False  # its name makes pytest take it for a test


def coco_ground_truth(name: str) -> dict:
    """The dataset as a COCO dict with every key that pycocotools' evaluation reads.

    Image ids, category ids and boxes are the file's own; unusable boxes are left out.
    """
    return {"annotations": [], **convert_to_coco_dict(name)}
