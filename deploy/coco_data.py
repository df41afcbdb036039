"""The images and ground truth of an evaluation. A COCO JSON needs the standard library only."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from deploy.errors import UserError
from fgd_inputs.classes import class_positions
from fgd_inputs.coco import read_test_set


@dataclass
class CocoData:
    """One detection dataset.

    name: as the user gave it; images: {"id", "file" (full path), "height", "width"} each;
    truth: dict in COCO's format with every key that pycocotools' evaluation reads. notes: what of
    the file was read otherwise than it stands, or left out.
    """

    name: str
    images: List[Dict[str, Any]]
    truth: Dict[str, Any]
    notes: List[str] = field(default_factory=list)

    def category_ids(self, classes: Sequence[str]) -> List[int]:
        """The dataset's category id of each class index of a model, matched by name.

        Raises:
            UserError: the names differ. AP over some of the classes would look like a bad model.
        """
        names = [category["name"] for category in self.truth["categories"]]
        positions = class_positions(classes, names, self.name)
        return [self.truth["categories"][i]["id"] for i in positions]

    @property
    def with_masks(self) -> bool:
        """Whether every true object has a mask to measure mask AP with."""
        return all("segmentation" in entry for entry in self.truth["annotations"])


def load_dataset(
    dataset: str, images: Optional[str] = None, masks: bool = False, option: str = "--images"
) -> CocoData:
    """A dataset by the path of its COCO JSON, or by its registered name.

    Args:
        dataset: path ending in .json, or a name registered with Detectron2 (imports it).
        images: image folder of a JSON; None = "images" beside it or one folder up, else its own.
        masks: whether the model has them; of a JSON without any, boxes alone are evaluated.
        option: by which ``images`` was given, for messages.
    Raises:
        UserError: not there, not COCO format, or without any usable box.
    """
    if dataset.endswith(".json") or Path(dataset).exists():
        return _of_json(dataset, images, masks, option)
    if images is not None:
        raise UserError(f"{option} goes with a JSON file; {dataset} is a registered name")
    data = _read_registered(dataset)
    if not data.truth["annotations"]:
        raise UserError(f"{dataset} has no usable box: there is nothing to measure AP against")
    return data


def _of_json(path: str, images: Optional[str], masks: bool, option: str) -> CocoData:
    hint = f"name the folder that file names are relative to with {option}"
    found = read_test_set(path, images or "", masks=masks, hint=hint)
    keys = ("id", "file", "height", "width")
    records = [{key: image[key] for key in keys} for image in found.images]
    dropped = found.dropped_text()
    notes = [*found.notes, *found.warnings, *([dropped] if dropped else [])]
    return CocoData(path, records, found.truth(), notes)


def _read_registered(name: str) -> CocoData:
    try:
        from detectron2.data import DatasetCatalog

        from fgd.data.datasets import coco_ground_truth, test_dataset
    except ImportError as error:
        raise UserError(
            f"{name} is not a .json file, and registered names need Detectron2 and fgd: {error}"
        ) from error
    name = test_dataset(name)
    records = [
        {"id": r["image_id"], "file": r["file_name"], "height": r["height"], "width": r["width"]}
        for r in DatasetCatalog.get(name)
    ]
    return CocoData(name, records, coco_ground_truth(name))
