"""What is written: a COCO JSON in which every box says who made it, and with what threshold."""

import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

from pycocotools import mask as mask_utils

from deploy.errors import UserError
from deploy.files import content_sha256, write_json
from deploy.labels.gate import Threshold
from deploy.labels.teacher import Teacher
from fgd_inputs.coco import CocoFile
from fgd_inputs.json_file import read_json

_MARK = "fgd-labels-1"


class Labelled(NamedTuple):
    """An image of the user's, and what the teacher found in it when it had this content."""

    file: str
    entry: Dict[str, Any]
    sha256: str


class LabelFile:
    """The dataset while it is put together.

    Args:
        teacher: whose boxes these are. thresholds: by class; others are not labelled.
        categories: {"id", "name"} by ascending id, in the teacher's order of classes.
        folder: which file names are to be relative to.
    """

    def __init__(
        self,
        teacher: Teacher,
        thresholds: Dict[str, Threshold],
        categories: Sequence[Dict[str, Any]],
        folder: str,
    ):
        self._teacher, self._thresholds = teacher, thresholds
        self._categories, self._folder = list(categories), folder
        self.images: List[Dict[str, Any]] = []
        self.annotations: List[Dict[str, Any]] = []

    @property
    def empty_images(self) -> int:
        return len(self.images) - len({x["image_id"] for x in self.annotations})

    def _add_image(self, file: str, height: int, width: int, sha256: Optional[str]) -> int:
        number = len(self.images) + 1
        name = os.path.relpath(os.path.abspath(file), self._folder)
        values = (number, Path(name).as_posix(), height, width, sha256)
        keys = ("id", "file_name", "height", "width", "sha256")
        self.images.append(dict(zip(keys, values)))
        return number

    def _add_box(self, image: int, category: Any, box: Sequence[float], **more: Any) -> None:
        annotation = {"id": len(self.annotations) + 1, "image_id": image, "category_id": category}
        self.annotations.append({**annotation, "bbox": list(box), "iscrowd": 0, **more})

    def add_found(self, images: Iterable[Labelled]) -> None:
        """The teacher's boxes from each class's threshold on."""
        names = self._teacher.classes
        for file, entry, sha256 in images:
            number = self._add_image(file, entry["height"], entry["width"], sha256)
            for i, label in enumerate(entry["labels"]):
                threshold = self._thresholds.get(names[label])
                if threshold is None or entry["scores"][i] < threshold.score:
                    continue
                x1, y1, x2, y2 = entry["boxes"][i]
                if x2 <= x1 or y2 <= y1:  # by rounding
                    continue
                box = [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)]
                mask = entry["masks"][i] if "masks" in entry else None
                made = {
                    **_shape(box, mask),
                    "score": entry["scores"][i],
                    "threshold": threshold.score,
                    "made_by": self._teacher.sha256,
                }
                self._add_box(number, self._categories[label]["id"], box, **made)

    def add_known(self, known: CocoFile) -> None:
        """Images that people labelled, with their boxes; "made_by" is their file's SHA-256."""
        ids = {image["id"]: image for image in known.images}
        numbers = {
            own: self._add_image(x["file"], x["height"], x["width"], content_sha256(x["file"]))
            for own, x in ids.items()
        }
        own_ids = dict(zip(known.category_ids, (x["id"] for x in self._categories)))
        made_by = content_sha256(known.path)
        for entry in known.annotations:
            keys = ("area", "iscrowd", "segmentation")
            more = {key: entry[key] for key in keys if key in entry}
            category = own_ids[entry["category_id"]]
            number = numbers[entry["image_id"]]
            self._add_box(number, category, entry["bbox"], **{**more, "made_by": made_by})

    def write(self, path: Path, facts: Dict[str, Any]) -> None:
        """Whole or not at all. ``facts``: more of how it was made, for "info"."""
        info = {
            "format": _MARK,
            "description": "boxes with a score were found by the teacher, not drawn by people",
            "teacher": {"file": self._teacher.name, "sha256": self._teacher.sha256},
            "thresholds": {name: x._asdict() for name, x in self._thresholds.items()},
            "images": self._folder,
            **facts,
        }
        lists = {"images": self.images, "annotations": self.annotations}
        write_json(path, {"info": info, "categories": self._categories, **lists})


def _shape(box: Sequence[float], mask: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    if mask is None:
        return {"area": box[2] * box[3]}
    area = float(mask_utils.area({**mask, "counts": mask["counts"].encode()}))
    return {"area": area or box[2] * box[3], "segmentation": mask}


def common_folder(files: Sequence[str]) -> str:
    """The deepest folder that all of these lie in, absolute."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])


def check_output(path: Path, inputs: Sequence[str]) -> None:
    """UserError if writing there would destroy labels that people made."""
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; expected the name of a .json file")
    if not path.exists():
        return
    if any(os.path.exists(x) and os.path.samefile(path, x) for x in inputs):
        raise UserError(f"--output {path} is a file that is read here; choose another")
    try:
        content = read_json(str(path), "--output")
        ours = content["info"]["format"] == _MARK
    except (UserError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--output {path} is there and not of this command; choose another")
