"""Detections in COCO's result format, for pycocotools, labelling tools and test servers. Stdlib."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from deploy.files import write_json
from fgd_inputs.classes import class_positions
from fgd_inputs.coco import read_coco
from fgd_inputs.file_names import find_entries


class CocoIds:
    """Image and category ids.

    Args:
        files: the images.
        classes: names of the model's classes, in order.
        annotations: COCO JSON that has the ids; it needs no annotations. Images are found by
            `file_name`, which may begin with folders; categories by name. None: ids are 1, 2, ...
            in the order of `files` and `classes`.
    Raises:
        UserError: a file is not in the JSON, or more than once; the class names differ; no COCO
            JSON.
    """

    def __init__(
        self, files: Sequence[Path], classes: Sequence[str], annotations: Optional[str] = None
    ):
        self.files, self.classes = [str(file) for file in files], list(classes)
        self.notes: List[str] = []  # what of the JSON was read otherwise than it stands
        self.own = annotations is None
        if self.own:
            self.images = {file: i for i, file in enumerate(self.files, 1)}
            self.categories = list(range(1, len(self.classes) + 1))
        else:
            found = read_coco(annotations, annotated=False, files=False)
            positions = class_positions(self.classes, found.class_names, annotations)
            self.categories = [found.category_ids[i] for i in positions]
            names = [image["file_name"] for image in found.images]
            entries, note = find_entries(annotations, names, self.files)
            self.images = {f: found.images[i]["id"] for f, i in zip(self.files, entries)}
            self.notes = [*found.notes, *([note] if note else [])]

    def write(self, output: Path, images: Sequence[Dict[str, Any]]) -> None:
        """coco_results.json, and coco_images.json if no dataset says what the ids are."""
        write_json(output / "coco_results.json", self.results(images))
        if self.own:
            write_json(output / "coco_images.json", self.dataset(images))

    def results(self, images: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """A dict per detection: image_id, category_id, bbox (x, y, width, height), score, and
        segmentation (RLE) where the model has masks.

        Args:
            images: entries of detections.json, see `deploy.predict`.
        """
        results = []
        for image in images:
            for i, (x1, y1, x2, y2) in enumerate(image["boxes"]):
                result = {
                    "image_id": self.images[image["file"]],
                    "category_id": self.categories[image["labels"][i]],
                    "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
                    "score": image["scores"][i],
                }
                if "segmentations" in image:
                    result["segmentation"] = image["segmentations"][i]
                results.append(result)
        return results

    def dataset(self, images: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
        """A COCO dataset without annotations that gives the ids their meaning."""
        return {
            "images": [
                {
                    "id": self.images[image["file"]],
                    "file_name": image["file"],
                    "height": image["height"],
                    "width": image["width"],
                }
                for image in images
            ],
            "categories": [
                {"id": i, "name": name} for i, name in zip(self.categories, self.classes)
            ],
            "annotations": [],
        }
