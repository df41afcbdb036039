"""A few test images with their objects, and what the student alone and a distilled one detect."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask

from fgd_inputs.image_files import BadImage
from fgd_inputs.names import figure_text

from ..data.datasets import register_from_config
from ..data.images import read_image
from ..errors import UserError
from .run import Run
from .summary import ground_truth, saved_detections

_FOUND = 0.5  # IoU from which on a detection has found an object, as in AP50


class Example(NamedTuple):
    """A test image: where it lies, and its objects, in COCO's format."""

    image_id: object
    path: Path
    objects: List[dict]


def examples(cfg: CfgNode, count: int) -> Tuple[List[Example], Dict[int, str]]:
    """So many test images with objects, evenly spaced, and the names of categories.

    Raises:
        UserError: the test set is not there.
    """
    truth = ground_truth(cfg)
    objects: Dict[object, List[dict]] = {}
    for entry in truth["annotations"]:
        if not entry.get("iscrowd"):
            objects.setdefault(entry["image_id"], []).append(entry)
    names = register_from_config(cfg, ("TEST",)).DATASETS.TEST
    records = [x for x in get_detection_dataset_dicts(names) if x["image_id"] in objects]
    chosen = records[:: max(1, len(records) // count)][:count]
    found = [Example(x["image_id"], Path(x["file_name"]), objects[x["image_id"]]) for x in chosen]
    return found, {x["id"]: x["name"] for x in truth["categories"]}


def best_detections(detections: Sequence[dict], example: Example) -> List[dict]:
    """As many of the best as there are objects: scores of two detectors mean different things."""
    own = [x for x in detections if x["image_id"] == example.image_id]
    return sorted(own, key=lambda x: -x["score"])[: len(example.objects)]


def right(detections: Sequence[dict], objects: Sequence[dict]) -> List[bool]:
    """Whether each detection, best first, has found an object that none before it has."""
    boxes = [[x["bbox"] for x in entries] for entries in (detections, objects)]
    if not detections or not objects:
        return [False] * len(detections)
    overlaps = np.array(coco_mask.iou(*map(np.array, boxes), [0] * len(objects)), float)
    classes = [[x["category_id"] for x in entries] for entries in (detections, objects)]
    overlaps[np.not_equal.outer(*map(np.array, classes))] = 0
    found = []
    for i in range(len(detections)):
        j = int(overlaps[i].argmax())
        found.append(bool(overlaps[i, j] >= _FOUND))
        if found[-1]:
            overlaps[:, j] = 0
    return found


def example_figure(runs: Sequence[Run], cfg: CfgNode, count: int = 4) -> Figure:
    """One row per image, one column for the truth and for each run.

    Raises:
        UserError: images or detections are not there.
    """
    shown, names = examples(cfg, count)
    if not shown:
        raise UserError("no test image has an object")
    found = [saved_detections(run) for run in runs]
    figure = Figure(figsize=(2.7 * (1 + len(runs)), 2.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1 + len(runs), squeeze=False)
    for line, example in zip(axes, shown):
        try:
            image = read_image(str(example.path), "RGB")
        except BadImage as error:
            raise UserError(str(error)) from error
        for axis in line:
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        _draw(line[0], example.objects, [True] * len(example.objects), names)
        for axis, detections in zip(line[1:], found):
            best = best_detections(detections, example)
            _draw(axis, best, right(best, example.objects), names)
    for axis, title in zip(axes[0], ("truth", *map(str, runs))):
        axis.set_title(figure_text(title), fontsize=9)
    return figure


def _draw(axis: Axes, entries: Sequence[dict], found: Sequence[bool], names: dict) -> None:
    colours = {category: f"C{i % 10}" for i, category in enumerate(names)}
    for entry, solid in zip(entries, found, strict=True):
        x, y, width, height = entry["bbox"]
        colour = colours[entry["category_id"]]
        corners = [x, x + width, x + width, x, x], [y, y, y + height, y + height, y]
        axis.plot(*corners, "-" if solid else ":", color=colour, linewidth=1.5)
        score = f" {entry['score']:.2f}" if "score" in entry else ""
        text = f"{names[entry['category_id']]}{score}"
        place = {"va": "bottom", "fontsize": 6, "color": "white"}
        box = {"facecolor": colour, "pad": 0.5, "linewidth": 0}
        axis.text(x, y, figure_text(text), bbox=box, clip_on=True, **place)
