"""Checkpoint -> the student alone, loaded completely or not at all, in eval mode on the CPU."""

import hashlib
import sys
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import Tensor, nn

from deploy.errors import UserError
from deploy.graphs import EXPORTABLE, supported
from deploy.receipt import origin_of
from fgd.config import checkpoint_config, load_config, load_config_text
from fgd.data.checks import NUM_CLASSES_KEYS
from fgd.data.settings import check_images
from fgd.trained_with import other_config
from fgd.weights import load_complete, read_weights
from fgd.yaml_config import leaves

INPUT_FORMATS = ("BGR", "RGB")
_KEPT = ("model", "config", "classes", "format")


@dataclass
class Student:
    """A plain Detectron2 model and what belongs to it."""

    model: nn.Module
    cfg: CfgNode
    classes: List[str]
    config_source: str  # where the config came from, for the report
    checkpoint_sha256: str
    dropped: Dict[str, Tuple[int, int]]  # other content of the file: key -> (tensors, bytes)
    origin: Dict[str, Any]  # who taught it and how, see `receipt.origin_of`


def load_student(
    path,
    config_file: Optional[str] = None,
    score_threshold: Optional[float] = None,
    proposals: Optional[int] = None,
) -> Student:
    """Build the student that a checkpoint holds and load it strictly.

    Args:
        path: local .pth (or the model zoo's .pkl).
        config_file: used instead of the config in the checkpoint or the config.yaml beside it.
        score_threshold: replaces the config's, in [0, 1).
        proposals: replaces the config's MODEL.RPN.POST_NMS_TOPK_TEST, at least 1.
    Raises:
        UserError: not a checkpoint, no config, an architecture that cannot be exported, a weight
            missing, left over, mismatched or not finite, or a wrong number of class names.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    checkpoint = read_weights(str(path))
    cfg, source = _find_config(path, checkpoint, config_file)
    cfg = _inference_config(cfg, source, score_threshold, proposals)
    model = _build(cfg, source)
    report = load_complete(model, str(path), what="student")
    # Older files hold buffers that are constants of the config today.
    unknown = sorted(set(report.unexpected) - {name for name, _ in model.named_buffers()})
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} weights belong to no part of the student "
            f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}); the file must hold "
            f"the plain student of the config from {source}"
        )
    dropped = {k: _measure(v) for k, v in checkpoint.items() if k not in _KEPT}
    return Student(
        model=model,
        cfg=cfg,
        classes=_class_names(path, checkpoint, cfg),
        config_source=source,
        checkpoint_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        dropped={key: size for key, size in dropped.items() if size[0]},
        origin=origin_of(checkpoint),
    )


def _find_config(path: Path, checkpoint: Dict, config_file: Optional[str]) -> Tuple[CfgNode, str]:
    beside = path.with_name("config.yaml")
    trained = checkpoint.get("config") if isinstance(checkpoint.get("config"), str) else None
    if config_file:
        cfg = load_config(config_file)
        said = other_config(str(path), trained, cfg)
        if said:
            print(said, file=sys.stderr)
        return cfg, config_file
    if trained:
        source = f"{path} (key 'config')"
        return load_config_text(trained, source), source
    if beside.is_file():
        return load_config(str(beside)), str(beside)
    raise UserError(
        f"{path}: no config. Looked for the key 'config' in the checkpoint (train_net.py writes "
        f"it) and for {beside}; give one with --config-file"
    )


def _inference_config(
    cfg: CfgNode, source: str, score_threshold: Optional[float], proposals: Optional[int]
) -> CfgNode:
    """The student's config for building it here: CPU, no weights of its own to fetch."""
    cfg = checkpoint_config(cfg)
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture not in EXPORTABLE:
        raise UserError(
            f"{source}: MODEL.META_ARCHITECTURE {architecture!r} cannot be exported; "
            f"supported: {supported()}"
        )
    _check_exportable(cfg, source)
    cfg.MODEL.DEVICE = "cpu"
    if score_threshold is not None:
        if not 0 <= score_threshold < 1:
            raise UserError(f"--score-threshold {score_threshold} is not in [0, 1)")
        model = cfg.MODEL
        for node in (model.RETINANET, model.FCOS, model.REPPOINTS, model.ROI_HEADS):
            node.SCORE_THRESH_TEST = score_threshold
    if proposals is not None:
        if architecture != "GeneralizedRCNN":
            raise UserError(f"--proposals {proposals}: {architecture} has no proposals")
        if proposals < 1:
            raise UserError(f"--proposals {proposals} is too small")
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = proposals
    return cfg


def _check_exportable(cfg: CfgNode, source: str) -> None:
    """UserError for settings that training takes and a graph cannot have."""
    check_images(cfg)
    if cfg.INPUT.FORMAT not in INPUT_FORMATS:
        raise UserError(
            f"{source}: INPUT.FORMAT {cfg.INPUT.FORMAT} cannot be exported: graphs take images of "
            f"three colours, {' or '.join(INPUT_FORMATS)}"
        )
    if cfg.TEST.DETECTIONS_PER_IMAGE < 1:
        raise UserError(
            f"{source}: TEST.DETECTIONS_PER_IMAGE {cfg.TEST.DETECTIONS_PER_IMAGE} (all) cannot be "
            "exported: a graph has room for a fixed number. Give one with --config-file"
        )


def _build(cfg: CfgNode, source: str) -> nn.Module:
    """The model in eval mode. UserError names the config key of a part that is not Detectron2's."""
    try:
        return build_model(cfg).eval()
    except KeyError as error:  # of a registry: "No object named 'X' found in 'Y' registry!"
        keys = [key for key, value in leaves(cfg) if f"'{value}'" in str(error)]
        if not keys:
            raise
        raise UserError(
            f"{source}: {' and '.join(keys)}: {error.args[0]} What other packages register cannot "
            "be exported"
        ) from error


def _class_names(path: Path, checkpoint: Dict, cfg: CfgNode) -> List[str]:
    """Names in the checkpoint, else the training set's, else "class_0", ..."""
    count = attrgetter(NUM_CLASSES_KEYS[cfg.MODEL.META_ARCHITECTURE])(cfg)
    names = checkpoint.get("classes")
    if not names and cfg.DATASETS.TRAIN and cfg.DATASETS.TRAIN[0] in MetadataCatalog.list():
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    if not names:
        return [f"class_{i}" for i in range(count)]
    if len(names) != count:
        raise UserError(f"{path}: {len(names)} class names ({names[0]}, ...), {count} classes")
    return [str(name) for name in names]


def _measure(value) -> Tuple[int, int]:
    """(number, bytes) of the tensors somewhere inside."""
    if isinstance(value, Tensor):
        return 1, value.numel() * value.element_size()
    children = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list, tuple)):
        return 0, 0
    sizes = [_measure(child) for child in children]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)
