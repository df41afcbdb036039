"""Second images: for each training image another one of the same size, under the same name."""

import os
from typing import Dict, Iterable, List, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from fgd_inputs.json_file import read_json
from fgd_inputs.names import one_line

from ..errors import UserError

KEY = "DATASETS.TRAIN_SECOND_IMAGES"
RECORD = "adversarial.json"  # in a folder of images that were made to mislead a teacher: which one


def add_second_images_config(cfg: CfgNode) -> None:
    """Add DATASETS.TRAIN_SECOND_IMAGES, in place."""
    # Folder of a second image of each training image, for methods that ask for it; nothing reads it
    # for others. Names are those of the training images below their image folder, or the same
    # ending in ".png"; sizes are the same. `python -m fgd.adversarial` makes one. "" = none.
    cfg.DATASETS.TRAIN_SECOND_IMAGES = ""


def relative_names(records: Sequence[dict], datasets: Iterable[str]) -> List[str]:
    """Name of each record's image file below the image folder of its dataset.

    Of images outside of all ``image_root``s of the datasets it is the file's own name.

    Args:
        records: Detectron2's dataset dicts. datasets: registered names.
    """
    roots = [MetadataCatalog.get(name).get("image_root") for name in datasets]
    roots = [os.path.join(os.path.abspath(root), "") for root in roots if root]

    def name(path: str) -> str:
        path = os.path.abspath(path)
        root = next((x for x in roots if path.startswith(x)), None)
        return os.path.basename(path) if root is None else path[len(root) :]

    return [name(record["file_name"]) for record in records]


def png_name(name: str) -> str:
    """The same name for a lossless file."""
    return os.path.splitext(name)[0] + ".png"


def with_second_images(records: Sequence[dict], folder: str, datasets: Iterable[str]) -> List[Dict]:
    """Copies of the records with "second_file_name".

    Raises:
        UserError: no folder, an image is not in it, or is that of two images; names the first.
    """
    if not folder:
        raise UserError(f"{KEY} names no folder, and the method needs second images")
    folder = os.path.abspath(os.path.expanduser(folder))
    if not os.path.isdir(folder):
        raise UserError(f"{KEY}: there is no folder {folder}")
    there = _listing(folder)
    found, missing, owner = [], [], {}
    for record, name in zip(records, relative_names(records, datasets), strict=True):
        second = next((x for x in (name, png_name(name)) if x in there), None)
        if second is None:
            missing.append(name)
            continue
        if owner.setdefault(second, record["file_name"]) != record["file_name"]:
            raise UserError(
                f"{KEY}: {second} in {folder} would be the second image of {owner[second]} and of "
                f"{record['file_name']}"
            )
        found.append({**record, "second_file_name": os.path.join(folder, second)})
    if missing:
        raise UserError(
            f"{KEY}: {folder} has no second image of {len(missing)} of {len(records)} training "
            f"images; the first is {missing[0]} (or {png_name(missing[0])})"
        )
    return found


def check_teacher_of(folder: str, sha256: str) -> None:
    """Images that mislead one teacher say nothing of another.

    Args:
        folder: may have no record of a teacher. sha256: of the present teacher's file.
    Raises:
        UserError: it has that of another one.
    """
    path = os.path.join(os.path.expanduser(folder), RECORD)
    if not os.path.isfile(path):
        return
    try:
        made_for = read_json(path, "record")["teacher"]
        weights, made = str(made_for["weights"]), str(made_for["sha256"])
    except (KeyError, TypeError):
        raise UserError(f"{KEY}: {path} names no teacher; delete it or make it again") from None
    if made != sha256:
        raise UserError(
            f"{KEY}: {folder} was made for another teacher, {one_line(weights)} (SHA-256 "
            f"{made[:8]}..., now {sha256[:8]}...). Make one for this teacher with "
            f"python -m fgd.adversarial, or delete {RECORD} there to use it all the same"
        )


def _listing(folder: str) -> set:
    """Names of all files below a folder: asked for once, not for each image."""
    return {
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
    }
