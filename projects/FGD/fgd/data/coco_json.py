"""Check a COCO-format JSON before training, so that its faults are named once and early."""

import json
import math
import os
from dataclasses import dataclass, field

from ..errors import UserError
from .coco_masks import check_mask, check_structure, no_polygon

__all__ = ["CocoSummary", "bad_box", "summarize"]

_SAMPLED_IMAGES = 100  # looking up all 118k files of COCO takes minutes on a network drive


@dataclass
class CocoSummary:
    """What a JSON holds.

    Attributes:
        class_names: in the order of their category ids, which is Detectron2's label order.
        category_ids: ascending; may have gaps.
        images, boxes: counts; boxes are the usable ones.
        dropped: annotations that no detector can use: {"annotation", "image", "reason"}.
        complete: every annotation has the keys that COCO's evaluation reads, and none is dropped.
    """

    class_names: list[str]
    category_ids: list[int]
    images: int
    boxes: int = 0
    dropped: list[dict] = field(default_factory=list)
    complete: bool = True

    def dropped_text(self) -> str:
        """For example "3 boxes dropped (2 zero area, 1 outside)"; "" when none is."""
        if not self.dropped:
            return ""
        reasons = [d["reason"] for d in self.dropped]
        counts = ", ".join(f"{reasons.count(r)} {r}" for r in dict.fromkeys(reasons))
        return f"{len(reasons)} boxes dropped ({counts})"


def bad_box(box, height: float, width: float) -> str | None:
    """Why an (x, y, w, h) box in pixels cannot be trained on; None when it can.

    Detectron2 would keep infinite boxes and mirror inverted ones. Partly outside is fine: it clips.
    """
    if not all(math.isfinite(v) for v in box):
        return "not finite"
    x, y, w, h = box
    if w < 0 or h < 0:
        return "inverted"
    if w == 0 or h == 0:
        return "zero area"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "outside"
    return None


def _read(path: str) -> dict:
    if not os.path.isfile(path):
        raise UserError(f"dataset JSON {path} does not exist")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"dataset JSON {path} cannot be read: {error}") from error
    except ValueError as error:
        kind = "is empty (0 bytes)" if os.path.getsize(path) == 0 else f"is not JSON: {error}"
        raise UserError(f"dataset JSON {path} {kind}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"dataset JSON {path} is not COCO format: it has no list {key!r}")
        if not content[key]:
            raise UserError(f"dataset JSON {path}: the list {key!r} is empty")
    return content


def _by_id(path: str, content: dict, key: str, needed: tuple[str, ...]) -> dict:
    """{id: entry}; UserError for an entry without a needed key or a repeated id."""
    entries: dict = {}
    for position, entry in enumerate(content[key]):
        missing = [k for k in ("id", *needed) if not isinstance(entry, dict) or k not in entry]
        if missing:
            raise UserError(f"dataset JSON {path}: {key}[{position}] has no {missing[0]!r}")
        if entry["id"] in entries:
            raise UserError(f"dataset JSON {path}: id {entry['id']!r} occurs twice in {key!r}")
        entries[entry["id"]] = entry
    return entries


def _check_images(path: str, image_root: str, images: dict) -> None:
    if not os.path.isdir(image_root):
        raise UserError(f"image folder {image_root} of dataset JSON {path} does not exist")
    for number, image in images.items():
        sides = (image["height"], image["width"])
        if not all(type(v) in (int, float) and v > 0 for v in sides):
            raise UserError(f"dataset JSON {path}: image {number!r} has height, width {sides}")
    names = [str(image["file_name"]) for image in images.values()]
    for name in names[:: max(1, len(names) // _SAMPLED_IMAGES)]:
        if not os.path.isfile(os.path.join(image_root, name)):
            raise UserError(f"image {name!r} of dataset JSON {path} is not in {image_root}")


def _check_annotation(path: str, entry: dict, categories: dict) -> None:
    where = f"dataset JSON {path}: annotation {entry['id']!r}"
    if entry["category_id"] not in categories:
        raise UserError(f"{where} has category_id {entry['category_id']!r}, not in 'categories'")
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        raise UserError(f"{where} has bbox {box!r}; expected four numbers x, y, width, height")
    check_structure(where, entry.get("segmentation"))


def _unusable(entry: dict, image: dict | None) -> str | None:
    """Why an annotation is dropped; None when it is used."""
    if image is None:
        return "of an absent image"
    if no_polygon(entry.get("segmentation")):
        return "without a polygon of three points"
    return bad_box(entry["bbox"], image["height"], image["width"])


def summarize(path: str, image_root: str, mask_format: str = "") -> CocoSummary:
    """Read and check one dataset.

    Args:
        path: the JSON.   image_root: the folder that its file names are relative to.
        mask_format: when masks are wanted, INPUT.MASK_FORMAT; then every usable box must have one.
    Raises:
        UserError: missing, empty, not JSON, not COCO format, ids repeated or unknown, a box that is
            not four numbers, no usable box at all, or images that are not there; with a mask format
            as `check_mask`. Names the path.
    """
    content = _read(path)
    categories = _by_id(path, content, "categories", ("name",))
    images = _by_id(path, content, "images", ("file_name", "height", "width"))
    annotations = _by_id(path, content, "annotations", ("image_id", "category_id", "bbox"))
    _check_images(path, image_root, images)
    ids = sorted(categories)
    summary = CocoSummary([categories[i]["name"] for i in ids], ids, len(images))
    for number, entry in annotations.items():
        _check_annotation(path, entry, categories)
        image = images.get(entry["image_id"])
        reason = _unusable(entry, image)
        if reason is None:
            if mask_format:
                where = f"dataset JSON {path}: annotation {number!r}"
                check_mask(where, entry, image, mask_format)
            summary.boxes += 1
            summary.complete &= "iscrowd" in entry and "area" in entry
        else:
            summary.dropped.append(
                {"annotation": number, "image": entry["image_id"], "reason": reason}
            )
    summary.complete &= not summary.dropped
    if not summary.boxes:
        raise UserError(f"dataset JSON {path} has no usable box; {summary.dropped_text()}")
    return summary
