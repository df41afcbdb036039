"""A COCO dataset of three plain images on which the fake graph's detections are known."""

import json

import numpy as np
from PIL import Image

from .fake_graph import CLASSES, FRACTIONS

SIZES = ((64, 96), (64, 64), (120, 100))  # height, width
CATEGORY_IDS = (7, 3, 12)  # of CLASSES: neither contiguous nor in order


def xywh(fractions, height, width):
    x1, y1, x2, y2 = np.array(fractions) * [width, height, width, height]
    return [x1, y1, x2 - x1, y2 - y1]


def truth(fractions=FRACTIONS):
    """A COCO dict whose boxes are the fake graph's, for every image and class."""
    images = [
        {"id": 10 + i, "file_name": f"{i}.png", "height": h, "width": w}
        for i, (h, w) in enumerate(SIZES)
    ]
    annotations = [
        {"image_id": image["id"], "category_id": category, "bbox": box}
        for image in images
        for category, box in zip(
            CATEGORY_IDS,
            (xywh(row, image["height"], image["width"]) for row in fractions),
            strict=True,
        )
    ]
    for i, annotation in enumerate(annotations):
        annotation["id"] = i + 1
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, CLASSES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_dataset(folder, content=None):
    """Write `folder`/test.json and `folder`/images/*.png; returns the JSON's path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate(SIZES):
        Image.new("RGB", (width, height), (26, 153, 255)).save(folder / "images" / f"{i}.png")
    path = folder / "test.json"
    path.write_text(json.dumps(content or truth()))
    return path
