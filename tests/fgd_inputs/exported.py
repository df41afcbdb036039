"""Exports of annotation tools on disk, as they are unpacked; see exports/README.md."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

import numpy as np
from PIL import Image

from tests.deploy.coco_files import SIZES
from tests.deploy.fake_graph import FRACTIONS

_PLAIN = ("first.png", "second.png", "third.png")


@dataclass
class Export:
    """Where a tool puts the JSON and the pictures, and what is said when it is read."""

    json: str
    pictures: Tuple[str, ...]
    notes: Tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return str(Path(self.pictures[0]).parent)


def _inside(folder, names=_PLAIN):
    return tuple(f"{folder}/{name}" for name in names)


EXPORTS = {
    "cvat": Export(
        "annotations/instances_train.json",
        _inside("images/train", ("shelf/left 1.png", "shelf/right 2.png", "übrig.png")),
        (
            "file names are looked up in train/",
            "1 boxes have an attribute rotation, but are read as not turned",
        ),
    ),
    "datumaro": Export(
        "annotations/instances_default.json",
        _inside("images/default"),
        ("file names are looked up in default/",),
    ),
    "label_studio": Export(
        "result.json",
        _inside(
            "images",
            ("3fa1c0de-first scene.png", "77b2d1ab-second scene.png", "9c0ffee1-third.png"),
        ),
        ("file names are read without %-escapes and the name of their folder",),
    ),
    "label_studio_storage": Export(
        "result.json", _inside("images"), ("file names are read without their folders",)
    ),
    "roboflow": Export(
        "train/_annotations.coco.json",
        _inside(
            "train",
            (
                "first_png.rf.0a1b2c3d4e5f60718293a4b5c6d7e8f9.png",
                "second_png.rf.1b2c3d4e5f60718293a4b5c6d7e8f90a.png",
                "third_png.rf.2c3d4e5f60718293a4b5c6d7e8f90a1b.png",
            ),
        ),
        ("category 0 'shapes' is a heading above the others, and no class",),
    ),
    "labelme": Export(
        "annotations.json",
        _inside("JPEGImages"),
        ("category 0 '_background_' is the background, and no class",),
    ),
    "labelme2coco": Export(
        "dataset.json",
        _inside("images"),
        (
            "file names are read without their folders",
            "1 areas that are no number above 0 are taken from mask or box",
        ),
    ),
    "via": Export(
        "via_export_coco.json",
        _inside("images"),
        (
            "10 references in image_id are read as a number, as the ids are",
            "4 segmentations of one flat list are read as one polygon",
        ),
    ),
    "supervisely": Export("annotations/instances.json", _inside("images")),
}


def unpack(tool: str, folder: Path) -> Path:
    """The export with its pictures; returns the JSON's path."""
    export = EXPORTS[tool]
    generator = np.random.default_rng(0)
    for name, (height, width) in zip(export.pictures, SIZES, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        pixels[:8, :8] = (26, 153, 255)  # scores of the fake graph
        Image.fromarray(pixels).save(folder / name)
    path = folder / export.json
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).parent / "exports" / f"{tool}.json", path)
    if tool == "roboflow":
        (folder / "images").mkdir()  # of the pictures before Roboflow had them
    return path


def true_boxes():
    """x1, y1, x2, y2 in the order of `CLASSES`, for each of the three pictures."""
    return [[[x1 * w, y1 * h, x2 * w, y2 * h] for x1, y1, x2, y2 in FRACTIONS] for h, w in SIZES]
