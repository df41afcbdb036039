"""A small COCO-format dataset on disk, with whatever fault a test wants."""

import json
from pathlib import Path

from PIL import Image


def coco_dict(images=3, classes=("cat", "dog"), category_ids=None):
    """One 20x10 px box per 64x48 px image; image ids 10, 20, ...; categories in turn."""
    ids = list(category_ids or range(1, len(classes) + 1))
    return {
        "images": [
            {"id": 10 * (i + 1), "file_name": f"{i}.png", "height": 48, "width": 64}
            for i in range(images)
        ],
        "annotations": [
            {
                "id": 100 + i,
                "image_id": 10 * (i + 1),
                "category_id": ids[i % len(ids)],
                "bbox": [4.0, 6.0, 20.0, 10.0],
                "area": 200.0,
                "iscrowd": 0,
            }
            for i in range(images)
        ],
        "categories": [{"id": i, "name": name} for i, name in zip(ids, classes, strict=True)],
    }


def write_coco(folder: Path, coco: dict, name: str = "labels.json") -> str:
    """Write the JSON into `folder` and a grey picture per image into `folder`/images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in coco["images"]:
        size = (image["width"], image["height"])
        Image.new("RGB", size, (90, 90, 90)).save(folder / "images" / image["file_name"])
    path = folder / name
    path.write_text(json.dumps(coco))
    return str(path)
