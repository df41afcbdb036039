"""The images and ground truth of an evaluation. A COCO JSON needs the standard library only."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from deploy.errors import UserError


@dataclass
class CocoData:
    """One detection dataset.

    name: as the user gave it; images: {"id", "file" (full path), "height", "width"} each;
    truth: dict in COCO's format with every key that pycocotools' evaluation reads.
    """

    name: str
    images: List[Dict[str, Any]]
    truth: Dict[str, Any]

    def category_ids(self, classes: Sequence[str]) -> List[int]:
        """The dataset's category id of each class index of a model, matched by name.

        Raises:
            UserError: the names differ. AP over some of the classes would look like a bad model.
        """
        ids = {category["name"]: category["id"] for category in self.truth["categories"]}
        missing, unknown = sorted(set(classes) - set(ids)), sorted(set(ids) - set(classes))
        if missing or unknown or len(ids) != len(self.truth["categories"]):
            raise UserError(
                f"classes of the model and of {self.name} differ: only in the model {missing}, "
                f"only in the dataset {unknown}, {len(self.truth['categories'])} in the dataset"
            )
        return [ids[name] for name in classes]

    def without_mask(self) -> int:
        """How many of the true boxes have no mask, as polygons or RLE, to measure mask AP with."""
        return sum(not _is_mask(a.get("segmentation")) for a in self.truth["annotations"])


def _is_mask(segmentation) -> bool:
    """COCO's forms: {"size", "counts"}, or polygons of three corners or more."""
    if isinstance(segmentation, dict):
        return {"size", "counts"} <= set(segmentation)
    return bool(segmentation) and all(len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)


def load_dataset(dataset: str, images: Optional[str] = None) -> CocoData:
    """A dataset by the path of its COCO JSON, or by its registered name.

    Args:
        dataset: path ending in .json, or a name registered with Detectron2 (imports it).
        images: image folder of a JSON; None = "images" beside it or one folder up, else its own.
    Raises:
        UserError: not there, not COCO format, or without any usable box.
    """
    if dataset.endswith(".json") or Path(dataset).exists():
        data = _read_json(Path(dataset), images)
    elif images is not None:
        raise UserError(f"--images goes with a JSON file; {dataset} is a registered name")
    else:
        data = _read_registered(dataset)
    if not data.truth["annotations"]:
        raise UserError(f"{dataset} has no usable box: there is nothing to measure AP against")
    return data


def _read_json(path: Path, images: Optional[str]) -> CocoData:
    try:
        truth = json.loads(path.read_text(encoding="utf-8"))
        folder = Path(images) if images else _image_folder(path.absolute())
        records = [
            {
                "id": image["id"],
                "file": str(folder / image["file_name"]),
                "height": int(image["height"]),
                "width": int(image["width"]),
            }
            for image in truth["images"]
        ]
        sizes = {record["id"]: (record["height"], record["width"]) for record in records}
        annotations = [_complete(entry) for entry in truth["annotations"]]
        truth["annotations"] = [a for a in annotations if _usable(a, sizes.get(a["image_id"]))]
        category_ids = {category["id"] for category in truth["categories"] if category["name"]}
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = f"no {error}" if isinstance(error, LookupError) else error
        raise UserError(f"cannot read {path} as a COCO JSON: {reason}") from error
    stray = {a["category_id"] for a in truth["annotations"]} - category_ids
    if stray or len(sizes) != len(records):
        what = f"category ids {sorted(stray)} are not declared" if stray else "image ids repeat"
        raise UserError(f"{path} is not a valid COCO JSON: {what}")
    return CocoData(str(path), records, truth)


def _image_folder(path: Path) -> Path:
    """The folder "images" beside the JSON or one folder up, else the JSON's own folder."""
    usual = [parent / "images" for parent in (path.parent, path.parent.parent)]
    return next((folder for folder in usual if folder.is_dir()), path.parent)


def _complete(annotation: Dict) -> Dict:
    """With the keys that hand-made files leave out and pycocotools needs."""
    _, _, width, height = map(float, annotation["bbox"])
    annotation["category_id"]  # KeyError: named by the caller
    return {"iscrowd": 0, "area": width * height, **annotation}


def _usable(annotation: Dict, size) -> bool:
    """Whether a detector could find the box; the trainer leaves out the same ones."""
    x, y, width, height = box = annotation["bbox"]
    return (
        size is not None
        and all(math.isfinite(value) for value in box)
        and min(width, height) > 0
        and x < size[1]
        and y < size[0]
        and min(x + width, y + height) > 0
    )


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
