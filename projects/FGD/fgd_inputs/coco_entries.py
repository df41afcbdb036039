"""The annotations of a COCO JSON: each field read, or refused by name."""

import math
import re
from collections import Counter
from typing import Any, Collection, Dict, List, Optional, Sequence

from . import coco_masks
from .errors import UserError
from .json_file import number, shown, whole

_SMALLEST = 1e-5  # pixels; Detectron2 trains on no box of such a side
_LARGEST = 1e7  # pixels; beyond it nothing is left of them in 32 bits
_COMPARED = 1000  # boxes that are held against their polygons
_DIGITS = re.compile(r"-?[0-9]{1,19}")
_FLAGS = {None: 0, "0": 0, "1": 1, "": 0}  # of iscrowd and ignore, beside 0, 1, true and false


def read_id(value: Any) -> Any:
    """An id as an int or a text; None if it is neither. numpy would drop a NUL at its end."""
    if isinstance(value, str):
        return None if "\0" in value else value
    return whole(value)


def as_id(value: Any, ids: Collection[Any]) -> Any:
    """The one of ``ids`` that a reference means; VIA refers to image 0 as "0". Else `read_id`."""
    read = read_id(value)
    if isinstance(read, str) and _DIGITS.fullmatch(read):
        other: Any = int(read)
    else:
        other = None if read is None else str(read)
    return other if read not in ids and other in ids else read


def bad_box(box: Sequence[float], height: float, width: float) -> Optional[str]:
    """Why an (x, y, w, h) box in pixels cannot be trained on; None when it can.

    Detectron2 would keep infinite boxes and mirror inverted ones. Partly outside is fine: it clips.
    """
    if not all(math.isfinite(v) for v in box):
        return "not finite"
    x, y, w, h = box
    if w < 0 or h < 0:
        return "inverted"
    if min(w, h) <= _SMALLEST:
        return "zero area"
    if max(map(abs, box)) > _LARGEST:
        return "too large"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "outside"
    return None


def read_annotations(found, entries: Sequence[Any], masks: str, keypoints: bool) -> List[tuple]:
    """Fill in annotations, dropped and notes of a `CocoFile` that has images and classes.

    Args:
        masks, keypoints: as `read_coco` takes them.
    Returns:
        Of some objects with polygons: (box, box around the polygons), x, y, width, height each.
    """
    reader = _Reader(found, masks, keypoints)
    seen: set = set()
    for position, entry in enumerate(entries):
        reader.read(position, entry)
        own = _id(entry)
        if own is not None and own in seen:
            reader.counts["annotations have the id of another one, and count all the same"] += 1
        seen.add(own)
    found.notes += [f"{count} {text}" for text, count in reader.counts.items()]
    return reader.extents


def _id(entry: dict) -> Any:
    value = entry.get("id")
    return value if isinstance(value, (int, float, str)) else None


class _Reader:
    """Reads one annotation after the other, and counts what it reads otherwise than it stands."""

    def __init__(self, found, masks: str, keypoints: bool):
        self.found, self.masks, self.keypoints = found, masks, keypoints
        self.images = {image["id"]: image for image in found.images}
        self.categories = set(found.category_ids)
        self.counts: Counter = Counter()
        self.extents: List[tuple] = []  # (box, box of its own polygons) of the first ones

    def read(self, position: int, entry: Any) -> None:
        where = f"dataset JSON {self.found.path}: annotations[{position}]"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {shown(entry)}; expected an object")
        own = _id(entry)
        if own is not None:
            where = f"dataset JSON {self.found.path}: annotation {shown(own)}"
        entry = self._usual(entry)
        image = self.images.get(self._reference(where, entry, "image_id", self.images))
        category = self._reference(where, entry, "category_id", self.categories)
        if category not in self.categories:
            raise UserError(f"{where} has category_id {shown(category)}, not in 'categories'")
        box, reason = self._box(where, entry), "of an absent image"
        if box is None:
            reason = "points alone"
        elif image is not None:
            reason = bad_box(box, image["height"], image["width"])
        crowd = self._flag(where, entry, "iscrowd") or self._ignored(where, entry)
        mask = None
        if reason is None and self.masks:
            mask = self._mask(where, entry, image, crowd)
            reason = None if mask else "without a polygon of three points"
        if reason is not None:
            label = position if own is None else own
            self.found.dropped.append(
                {"annotation": label, "image": entry["image_id"], "reason": reason}
            )
            return
        self._keep(where, entry, image, category, box, crowd, mask)

    def _keep(self, where, entry, image, category, box, crowd, mask) -> None:
        read = {
            "id": len(self.found.annotations) + 1,
            "image_id": image["id"],
            "category_id": category,
            "bbox": box,
            "area": self._area(entry, box, image, mask),
            "iscrowd": crowd,
        }
        if mask is not None:
            read["segmentation"] = mask.segmentation
        if self.keypoints:
            read.update(_keypoints(where, entry))
        self.found.annotations.append(read)
        if len(self.extents) < _COMPARED:
            polygons = self._polygons(entry)
            self.extents += [(box, coco_masks.extent(polygons))] if polygons else []

    def _usual(self, entry: dict) -> dict:
        """With a polygon that is one flat list, as some tools write it, in a list of polygons."""
        value = entry.get("segmentation")
        if not isinstance(value, list) or not value or number(value[0]) is None:
            return entry
        self.counts["segmentations of one flat list are read as one polygon"] += 1
        return {**entry, "segmentation": [value]}

    def _reference(self, where: str, entry: dict, key: str, ids: Collection[Any]) -> Any:
        if key not in entry:
            raise UserError(f"{where} has no {key!r}")
        value = entry[key]
        read = as_id(value, ids)
        if read is None:
            raise UserError(f"{where} has {key} {shown(value)}; expected an id")
        if isinstance(read, str) != isinstance(value, str):
            kind = "a text" if isinstance(read, str) else "a number"
            self.counts[f"references in {key} are read as {kind}, as the ids are"] += 1
        return read

    def _box(self, where: str, entry: dict) -> Optional[List[float]]:
        """x, y, width, height; None where the annotation consists of keypoints."""
        box = entry.get("bbox")
        if box is None or box == []:
            polygons = self._polygons(entry)
            if polygons is not None:
                self.counts["annotations without a box get that of their polygons"] += 1
                return coco_masks.extent(polygons)
            if entry.get("keypoints") and entry.get("segmentation") in (None, [], [[]]):
                return None
        read = [number(v) for v in box] if isinstance(box, list) else []
        if len(read) != 4 or None in read:
            stated = f"bbox {shown(box)}" if "bbox" in entry else "no 'bbox'"
            raise UserError(f"{where} has {stated}; expected four numbers x, y, width, height")
        self._note_rotation(entry)
        return read

    def _note_rotation(self, entry: dict) -> None:
        """CVAT writes a turned rectangle as it lay before, and the angle beside it."""
        attributes = entry.get("attributes")
        if isinstance(attributes, dict) and number(attributes.get("rotation")):
            self.counts["boxes have an attribute rotation, but are read as not turned"] += 1

    def _polygons(self, entry: dict) -> Optional[list]:
        """Those of an annotation, also where masks are not wanted; None without usable ones."""
        value = entry.get("segmentation")
        if not isinstance(value, list):  # an RLE would be decoded for nothing
            return None
        try:
            mask = coco_masks.read_mask("", value, 0, 0)
        except UserError:
            return None
        return None if mask is None else mask.segmentation

    def _flag(self, where: str, entry: dict, key: str) -> int:
        value = entry.get(key)
        if isinstance(value, bool):
            return int(value)
        read = whole(value)
        if read is None and (value is None or isinstance(value, str)):
            read = _FLAGS.get(value.strip() if isinstance(value, str) else value)
        if read not in (0, 1):
            raise UserError(f"{where} has {key} {shown(value)}; expected 0 or 1")
        return read

    def _ignored(self, where: str, entry: dict) -> int:
        ignored = self._flag(where, entry, "ignore")
        if ignored:
            self.counts["boxes marked ignore are read as crowd regions (iscrowd 1)"] += 1
        return ignored

    def _mask(self, where: str, entry: dict, image: dict, crowd: int) -> Optional[coco_masks.Mask]:
        value = entry.get("segmentation")
        if not coco_masks.states_mask(value):
            raise UserError(
                f"{where} has no segmentation, but masks are wanted for every box; to train on "
                "boxes alone set MODEL.MASK_ON False"
            )
        mask = coco_masks.read_mask(where, value, image["height"], image["width"])
        if self.masks == coco_masks.POLYGON and isinstance(value, dict) and not crowd:
            raise UserError(
                f"{where} has an RLE mask, which INPUT.MASK_FORMAT polygon cannot hold; set "
                "INPUT.MASK_FORMAT bitmask"
            )
        return mask

    def _area(self, entry: dict, box: List[float], image: dict, mask) -> float:
        """As stated; else that of the mask, or of the box."""
        stated = number(entry.get("area"))
        if stated is not None and math.isfinite(stated) and stated > 0:
            return stated
        if "area" in entry:
            self.counts["areas that are no number above 0 are taken from mask or box"] += 1
        if mask is None:
            mask = self._readable_mask(entry, image)
        return mask.area if mask is not None and mask.area > 0 else box[2] * box[3]

    def _readable_mask(self, entry: dict, image: dict) -> Optional[coco_masks.Mask]:
        try:
            segmentation = entry.get("segmentation")
            return coco_masks.read_mask("", segmentation, image["height"], image["width"])
        except UserError:
            return None


def _keypoints(where: str, entry: dict) -> Dict[str, Any]:
    """The keypoints as x, y, visibility of each; none where an object has none."""
    value = entry.get("keypoints")
    if value is None or value == []:
        return {}
    points = [number(v) for v in value] if isinstance(value, list) else [None]
    if len(points) % 3 or not all(v is not None and math.isfinite(v) for v in points):
        raise UserError(
            f"{where} has keypoints {shown(value)}; expected numbers x, y, visibility of each point"
        )
    return {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
