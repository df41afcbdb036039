"""A generated detection set: filled shapes as ordinary PNG files and a COCO-format JSON.

Deterministic: the same settings give the same pixels and the same JSON, and image `i` does not
depend on how many images are asked for. `python -m fgd.data.shapes OUTPUT --images 200` writes one.
"""

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fgd_inputs.json_file import read_json

from ..errors import UserError
from .drawing import CLASSES, VERSION, ShapesSettings, draw_image

__all__ = ["ShapesSettings", "generate", "main"]

JSON_NAME, IMAGE_FOLDER = "annotations.json", "images"


def _annotation(number: int, image_id: int, label: int, points: np.ndarray) -> dict:
    """COCO annotation: box = extent of the polygon, area = of the polygon (shoelace formula)."""
    low, high = points.min(axis=0), points.max(axis=0)
    x, y = points.T
    return {
        "id": number,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [round(float(v), 2) for v in (*low, *(high - low))],
        "area": round(abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2, 2),
        "iscrowd": 0,
        "segmentation": [[float(v) for v in points.round(2).ravel()]],
    }


def _write(folder: Path, settings: ShapesSettings) -> None:
    (folder / IMAGE_FOLDER).mkdir()
    images, annotations = [], []
    for index in range(settings.images):
        pixels, objects = draw_image(index, settings)
        name = f"{index:06d}.png"
        Image.fromarray(pixels).save(folder / IMAGE_FOLDER / name, compress_level=1)
        height, width = pixels.shape[:2]
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for label, points in objects:
            annotations.append(_annotation(len(annotations) + 1, index + 1, label, points))
    categories = [{"id": i + 1, "name": CLASSES[i]} for i in range(settings.classes)]
    coco = {
        "info": _info(settings),
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (folder / JSON_NAME).write_text(json.dumps(coco))


def _info(settings: ShapesSettings) -> dict:
    return {
        "description": "drawn shapes, fgd.data.shapes",
        "version": VERSION,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),  # tuples as lists
    }


def _is_complete(folder: Path, settings: ShapesSettings) -> bool:
    """Whether `folder` holds exactly this set; UserError when it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        info = dict(read_json(str(folder / JSON_NAME), "dataset JSON")["info"])
        count = sum(1 for _ in (folder / IMAGE_FOLDER).glob("*.png"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} exists and is not a set of drawn shapes ({error})") from error
    if info != _info(settings) or count != settings.images:
        raise UserError(
            f"{folder} holds other shapes than asked for (settings {info.get('settings')}, {count} "
            "images): delete it or choose another folder"
        )
    return True


def generate(folder, settings: ShapesSettings) -> Path:
    """Write the set into `folder` and return its JSON; a folder with the same set is kept as it is.

    The folder appears complete or not at all, also when several processes write it at once.
    Raises UserError when it holds something else, or cannot be written.
    """
    folder = Path(folder)
    if _is_complete(folder, settings):
        return folder / JSON_NAME
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write drawn shapes to {folder}: {error}") from error
    try:
        _write(scratch, settings)
        scratch.chmod(0o755)  # mkdtemp makes it private
        os.replace(scratch, folder)
    except OSError as error:
        if not _is_complete(folder, settings):  # else another process was first
            raise UserError(f"cannot write drawn shapes to {folder}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder / JSON_NAME


def main(argv=None) -> int:
    """Command line: one option per setting."""
    parser = argparse.ArgumentParser(prog="python -m fgd.data.shapes", description=__doc__)
    parser.add_argument("output", help="folder to write; it must be new, empty or the same set")
    for field in dataclasses.fields(ShapesSettings):
        pair = isinstance(field.default, tuple)
        kind = type(field.default[0] if pair else field.default)
        parser.add_argument(
            f"--{field.name}", type=kind, nargs=2 if pair else None, default=field.default
        )
    values = vars(parser.parse_args(argv))
    output = values.pop("output")
    try:
        settings = ShapesSettings(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )
        path = generate(output, settings)
    except UserError as error:
        parser.error(str(error))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
