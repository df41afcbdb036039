"""A COCO JSON as training, evaluation and prediction read it: one rule for every field.

What annotation tools write is understood, with a note where it is read otherwise than it stands,
or refused with file and entry.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, List, Sequence

from .coco_entries import as_id, read_annotations, read_id
from .coco_masks import BITMASK, states_mask
from .coco_suspicion import suspicions
from .errors import UserError
from .file_names import find_files, image_folder
from .json_file import number, read_json, shown, whole

_WHAT = "dataset JSON"
_HINT = "name the folder of the images"
MAX_SIDE = 10**6  # pixels
_BACKGROUND = ("_background_", "__background__")


@dataclass
class CocoFile:
    """What a file holds, read.

    Attributes:
        images: by ascending id: {"id", "file_name" as written, "file" full path, "height",
            "width"}.
        categories: by ascending id: {"id", "name"}; that is the order of labels.
        annotations: in the order of the file: {"id" counted from 1, "image_id", "category_id",
            "bbox" [x, y, width, height] in pixels, "area", "iscrowd" 0 or 1}, "segmentation" where
            masks are wanted, "keypoints" where they are.
        dropped: annotations that no detector can use: {"annotation", "image", "reason"}.
        states_masks: whether any annotation has a mask, wanted or not.
        notes: readings that differ from what stands there. warnings: what is probably meant
            otherwise.
    """

    path: str
    images: List[Dict[str, Any]]
    categories: List[Dict[str, Any]]
    annotations: List[Dict[str, Any]] = field(default_factory=list)
    dropped: List[Dict[str, Any]] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    states_masks: bool = False

    @property
    def class_names(self) -> List[str]:
        return [category["name"] for category in self.categories]

    @property
    def category_ids(self) -> List[Any]:
        return [category["id"] for category in self.categories]

    @property
    def crowds(self) -> int:
        return sum(entry["iscrowd"] for entry in self.annotations)

    def counted(self) -> str:
        """For example "12 images, 91 boxes, 46 of them crowd regions"."""
        return f"{len(self.images)} images, {count_boxes(len(self.annotations), self.crowds)}"

    def dropped_text(self) -> str:
        """For example "3 boxes dropped (2 zero area, 1 outside)"; "" when none is."""
        if not self.dropped:
            return ""
        reasons = Counter(entry["reason"] for entry in self.dropped)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return f"{len(self.dropped)} boxes dropped ({counts})"

    def truth(self) -> Dict[str, Any]:
        """A COCO dict with every key that pycocotools' evaluation reads."""
        keys = ("id", "file_name", "height", "width")
        return {
            "info": {},
            "images": [{key: image[key] for key in keys} for image in self.images],
            "categories": self.categories,
            "annotations": self.annotations,
        }

    def check_boxes(self) -> None:
        """Raise UserError if there is nothing to train on or to evaluate against."""
        if not self.annotations:
            text = self.dropped_text()
            raise UserError(f"{_WHAT} {self.path} has no usable box{text and f'; {text}'}")
        if self.crowds == len(self.annotations):
            raise UserError(
                f"{_WHAT} {self.path}: all {self.crowds} boxes are crowd regions (iscrowd or "
                "ignore 1), which are neither trained on nor counted; set both 0 for single objects"
            )


def count_boxes(boxes: int, crowds: int) -> str:
    """For example "91 boxes, 46 of them crowd regions"."""
    return f"{boxes} boxes, {crowds} of them crowd regions" if crowds else f"{boxes} boxes"


def read_coco(
    path: str,
    images: str = "",
    *,
    masks: str = "",
    keypoints: bool = False,
    annotated: bool = True,
    files: bool = True,
    hint: str = _HINT,
) -> CocoFile:
    """Read and check one file.

    Args:
        images: folder of the images; "" = see `image_folder`.
        masks: "" = masks are not looked at; "bitmask" = they may be polygons or RLE; "polygon" =
            polygons, but of crowd regions.
        keypoints: whether they are wanted; else they are not looked at.
        annotated: False for a file that only says which images and classes there are.
        files: whether images are to be there. hint: what to set if they are not.
    Raises:
        UserError: it cannot be read, or an entry cannot be understood: path, entry, what was found,
            what is expected.
    """
    content = read_json(path, _WHAT)
    lists = ("images", "categories", *(("annotations",) if annotated else ()))
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{_WHAT} {path} is not COCO format: it has no list {key!r}")
        if not content[key]:
            raise UserError(f"{_WHAT} {path}: the list {key!r} is empty")
    found = CocoFile(path, _images(path, content["images"]), [])
    entries = content.get("annotations") or []
    _read_categories(found, content["categories"], entries)
    if files:
        _find_files(found, image_folder(path, images), hint)
    if annotated:
        found.warnings = suspicions(found, read_annotations(found, entries, masks, keypoints))
        found.states_masks = any(states_mask(entry.get("segmentation")) for entry in entries)
    return found


def read_test_set(path: str, images: str = "", *, masks: bool, **options: Any) -> CocoFile:
    """`read_coco` for an evaluation: without boxes it is refused, without any mask read for boxes.

    Args:
        masks: whether the model has them. Where some objects have a mask, all need one.
    """
    found = read_coco(path, images, masks="", **options)
    if masks and found.states_masks:
        found = read_coco(path, images, masks=BITMASK, **options)
    elif masks:
        found.notes.append("no object has a mask, so that masks are not evaluated")
    found.check_boxes()
    return found


def _find_files(found: CocoFile, folder: str, hint: str) -> None:
    names = [image["file_name"] for image in found.images]
    paths, note = find_files(found.path, folder, names, hint)
    for image, file in zip(found.images, paths):
        image["file"] = file
    found.notes += [note] if note else []


def _entries(path: str, key: str, values: Sequence[Any]) -> List[dict]:
    """The list as dicts with ids of one kind, each once, by ascending id."""
    for position, entry in enumerate(values):
        if not isinstance(entry, dict):
            raise UserError(
                f"{_WHAT} {path}: {key}[{position}] is {shown(entry)}; expected an object"
            )
        if "id" not in entry:
            raise UserError(f"{_WHAT} {path}: {key}[{position}] has no 'id'")
    ids = [read_id(entry["id"]) for entry in values]
    kind = next((type(x) for x in ids if x is not None), int)
    seen: set = set()
    for position, own in enumerate(ids):
        if type(own) is not kind:
            other = "numbers" if kind is int else "texts"
            raise UserError(
                f"{_WHAT} {path}: {key}[{position}] has id {shown(values[position]['id'])}; "
                f"expected whole numbers, or texts, throughout: the others are {other}"
            )
        if own in seen:
            raise UserError(f"{_WHAT} {path}: id {shown(own)} occurs twice in {key!r}")
        seen.add(own)
    counted = all(isinstance(own, str) and own.isdecimal() and len(own) < 20 for own in ids)
    order = sorted(range(len(ids)), key=lambda i: int(ids[i]) if counted else ids[i])
    return [{**values[i], "id": ids[i]} for i in order]


def _images(path: str, values: Sequence[Any]) -> List[Dict[str, Any]]:
    images = []
    for entry in _entries(path, "images", values):
        where = f"{_WHAT} {path}: image {shown(entry['id'])}"
        for key in ("file_name", "height", "width"):
            if key not in entry:
                raise UserError(f"{where} has no {key!r}")
        name = entry["file_name"]
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(f"{where} has file_name {shown(name)}; expected the name of a file")
        sides = [whole(entry[key]) for key in ("height", "width")]
        if not all(side is not None and 0 < side <= MAX_SIDE for side in sides):
            found = ", ".join(shown(entry[key]) for key in ("height", "width"))
            raise UserError(f"{where} has height, width {found}; expected pixels")
        images.append(
            dict(zip(("id", "file_name", "height", "width"), (entry["id"], name, *sides)))
        )
    return images


def _read_categories(found: CocoFile, values: Sequence[Any], annotations: Any) -> None:
    """Fill in classes; a category that no box has, and that tools add by themselves, is none."""
    entries = _entries(found.path, "categories", values)
    entries = _without_headings(found, entries, annotations)
    names: Dict[str, Any] = {}
    for entry in entries:
        where = f"{_WHAT} {found.path}: category {shown(entry['id'])}"
        name = entry.get("name")
        if number(name) is not None:
            name = json.dumps(name)
            found.notes.append("category names that are numbers are read as text")
        if not isinstance(name, str) or not name.strip() or not _is_unicode(name):
            stated = f"name {shown(name)}" if "name" in entry else "no 'name'"
            raise UserError(f"{where} has {stated}; expected a text")
        if name in names:
            raise UserError(
                f"{where} has the name {shown(name)}, as category {shown(names[name])} has; two "
                "classes of one name cannot be told apart"
            )
        names[name] = entry["id"]
    found.categories = [{"id": number_, "name": name} for name, number_ in names.items()]
    found.notes = list(dict.fromkeys(found.notes))


def _is_unicode(text: str) -> bool:
    """Whether it can be written at all: half a character, as JSON's "\\ud800", cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_headings(found: CocoFile, entries: List[dict], annotations: Any) -> List[dict]:
    """Without Roboflow's root, the supercategory of all others, and without labelme's background.

    Only where no box belongs to them, and something else is left.
    """
    ids = {entry["id"] for entry in entries}
    boxes = annotations if isinstance(annotations, list) else []
    used = {as_id(x.get("category_id"), ids) for x in boxes if isinstance(x, dict)}
    for entry in entries:
        name = entry.get("name")
        others = [x for x in entries if x is not entry]
        if entry["id"] in used or not others or not isinstance(name, str):
            continue
        on_top = entry.get("supercategory") in (None, "", "none")
        if on_top and all(x.get("supercategory") == name for x in others):
            kind = "a heading above the others"
        elif name in _BACKGROUND:
            kind = "the background"
        else:
            continue
        found.notes.append(f"category {shown(entry['id'])} {shown(name)} is {kind}, and no class")
        return others
    return entries
