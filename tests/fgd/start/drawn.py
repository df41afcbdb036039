"""Small COCO sets of drawn images for the tests of a start."""

import json
from pathlib import Path
from typing import List, Sequence

import numpy as np
from PIL import Image

from fgd.start.survey import Survey, take
from fgd_inputs.coco import read_coco


def blocks(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Coarse random blocks: images of two seeds look different, also as thumbnails."""
    grid = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.BICUBIC)


def write_set(
    folder: Path,
    sizes: Sequence[tuple] = ((64, 64),) * 8,
    boxes: Sequence[Sequence[tuple]] = (),
    classes: Sequence[str] = ("a", "b"),
    pictures: Sequence[Image.Image] = (),
    draw: bool = True,
) -> Path:
    """Write ``folder``/data.json and images; the path of the JSON.

    Args:
        sizes: width, height of each image. boxes: for each image (class, x, y, width, height);
            default: one of class 0, 20x20. pictures: default: `blocks` of their number.
        draw: whether to write them.
    """
    (folder / "images").mkdir(parents=True)
    if draw:
        pictures = pictures or [blocks(i, *size) for i, size in enumerate(sizes)]
        sizes = [picture.size for picture in pictures]
    boxes = boxes or [[(0, 10, 10, 20, 20)] for _ in sizes]
    coco: dict = {"images": [], "annotations": []}
    coco["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    for i, ((width, height), own) in enumerate(zip(sizes, boxes, strict=True)):
        name = f"{i}.png"
        if draw:
            pictures[i].save(folder / "images" / name)
        coco["images"].append({"id": i, "file_name": name, "width": width, "height": height})
        for label, *box in own:
            entry = {"id": len(coco["annotations"]) + 1, "image_id": i, "category_id": label + 1}
            coco["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3]})
    path = folder / "data.json"
    path.write_text(json.dumps(coco))
    return path


def surveyed(folder: Path, **options) -> Survey:
    """Of `write_set`, whose images are not needed."""
    return take(read_coco(str(write_set(folder, draw=False, **options)), files=False))


def names_of(path: Path) -> List[str]:
    """Files of a JSON's images."""
    return sorted(image["file_name"] for image in json.loads(path.read_text())["images"])
