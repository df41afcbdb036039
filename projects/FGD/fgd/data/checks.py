"""Classes of the datasets against classes of the model, before the first step.

Without this, a dataset with one class too many trains the extra class as background, one with fewer
wastes outputs, and one with two more dies in a CUDA assert.
"""

import logging
from contextlib import ExitStack, contextmanager
from typing import Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from fgd_inputs.classes import class_positions

from ..config import student_config
from ..errors import UserError

__all__ = ["check_class_count", "class_names", "config_value", "matched_by_name"]

logger = logging.getLogger(__name__)

# Meta-architecture -> the config key of its number of classes. A new detector adds one line.
NUM_CLASSES_KEYS = {
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "FCOS": "MODEL.FCOS.NUM_CLASSES",
    "RepPoints": "MODEL.REPPOINTS.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
}


def config_value(cfg: CfgNode, key: str):
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _dataset_classes(name: str) -> list[str]:
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)  # sets registered by Python code learn their classes on loading
    classes = metadata.get("thing_classes")
    if not classes:
        raise UserError(f"dataset {name!r} has no thing_classes")
    return list(classes)


def class_names(cfg: CfgNode) -> list[str]:
    """Class names in label order, the same for every dataset of the config.

    Args:
        cfg: as `register_from_config` returned it. Names that it was told to leave alone, and that
            are not registered, are passed over: evaluation does without the training set.
    Raises:
        UserError: no dataset at all, or two that differ in names or order; shows both.
    """
    listed = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, *cfg.DATASETS.VALID]
    datasets = [name for name in listed if name in DatasetCatalog.list()]
    if not datasets:
        raise UserError(f"no registered dataset tells the class names (DATASETS lists {listed})")
    first = _dataset_classes(datasets[0])
    for other in datasets[1:]:
        classes = _dataset_classes(other)
        if classes != first:
            raise UserError(
                f"datasets {datasets[0]!r} and {other!r} differ in their classes or the order of "
                f"them: {_shorten(first)} against {_shorten(classes)}"
            )
    return first


def check_class_count(cfg: CfgNode) -> list[str]:
    """Class names, after checking that the student has exactly one output for each.

    Raises:
        UserError: the counts differ, with both counts, the names and the key to set; or as
            `class_names`; or a meta-architecture whose key is not known here.
    """
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    if architecture not in NUM_CLASSES_KEYS:
        known = ", ".join(NUM_CLASSES_KEYS)
        raise UserError(f"student architecture {architecture!r} is none of those known: {known}")
    key = NUM_CLASSES_KEYS[architecture]
    names, count = class_names(cfg), config_value(cfg, key)
    if len(names) != count:
        raise UserError(
            f"the dataset has {len(names)} classes ({_shorten(names)}) but {key} is {count}: "
            f"set {key} {len(names)}"
        )
    return names


@contextmanager
def matched_by_name(cfg: CfgNode, classes: Sequence[str]) -> Iterator[None]:
    """Inside, the test sets are evaluated as having a model's classes in the model's order.

    Args:
        cfg: as `register_from_config` returned it.
        classes: of the model, which the test sets may number otherwise.
    Raises:
        UserError: the names differ, or a set does not say by which numbers it knows its classes.
    """
    with ExitStack() as stack:
        for name in cfg.DATASETS.TEST:
            own = _dataset_classes(name)
            positions = class_positions(classes, own, f"dataset {name!r}")
            if positions == list(range(len(own))):
                continue
            key, value = _renumbered(name, classes, positions)
            stack.enter_context(_set(MetadataCatalog.get(name), key, value))
            logger.warning(
                f"{name}: classes are matched by name, the model has them in another order: "
                f"{_shorten(list(classes))} against {_shorten(own)}"
            )
        yield


def _renumbered(name: str, classes: Sequence[str], positions: list[int]) -> tuple[str, object]:
    """The key of the metadata, and its value, by which evaluators read a model's labels."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "pascal_voc":
        return "thing_classes", list(classes)
    key = "thing_dataset_id_to_contiguous_id"
    if metadata.get(key) is None:
        raise UserError(
            f"dataset {name!r} has the model's classes in another order and no category ids: "
            f"register it as {_shorten(list(classes))}"
        )
    ids = {label: number for number, label in metadata.get(key).items()}
    return key, {ids[position]: label for label, position in enumerate(positions)}


@contextmanager
def _set(metadata: Metadata, key: str, value: object) -> Iterator[None]:
    """Detectron2's metadata can be set once only."""
    before = vars(metadata).pop(key)
    setattr(metadata, key, value)
    try:
        yield
    finally:
        vars(metadata)[key] = before


def _shorten(names: list[str], most: int = 12) -> str:
    shown = [" ".join(name.split()) for name in names[:most]]  # a line break would end the message
    return ", ".join(shown) + (f", ... {len(names)} in all" if len(names) > most else "")
