"""Boxes that are probably meant otherwise: corners, shares of the image, painted masks."""

from typing import List, Sequence

from .coco_entries import bad_box

_FEW = 5  # boxes: fewer say nothing
_BEYOND = 0.2  # share of boxes that reach beyond their image as they stand
_NEARLY_ALL = 0.95
_MANY = 0.2  # share of crowd regions
_PIXEL = 1.0


def suspicions(found, extents: Sequence[tuple]) -> List[str]:
    """A sentence with the evidence for each suspicion about a `CocoFile`.

    Args:
        extents: as `read_annotations` returns them.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in found.images}
    boxes = [(entry["bbox"], *sizes[entry["image_id"]]) for entry in found.annotations]
    dropped = sum(entry["reason"] in ("zero area", "outside") for entry in found.dropped)
    if len(boxes) + dropped < _FEW:
        return []
    checks = (_under_a_pixel(boxes), _corners(boxes), _other_polygons(extents), _crowds(found))
    return [text for text in checks if text]


def _under_a_pixel(boxes: list) -> str:
    small = sum(max(box) <= _PIXEL and min(h, w) > 8 for box, h, w in boxes)
    if not boxes or small < _NEARLY_ALL * len(boxes):
        return ""
    return (
        f"{small} of {len(boxes)} boxes lie within the first pixel of their image: they look like "
        "shares of width and height; COCO has pixels"
    )


def _corners(boxes: list) -> str:
    """As x1, y1, x2, y2 all would lie inside, as x, y, width, height many do not."""
    if not boxes:
        return ""
    beyond = sum(b[0] + b[2] > w + 1 or b[1] + b[3] > h + 1 for b, h, w in boxes)
    inside = sum(
        b[0] < b[2] <= w + 1 and b[1] < b[3] <= h + 1 and min(b) >= -1 for b, h, w in boxes
    )
    if beyond < _BEYOND * len(boxes) or inside < _NEARLY_ALL * len(boxes):
        return ""
    return (
        f"{beyond} of {len(boxes)} boxes reach beyond their image as x, y, width, height, and "
        f"{inside} lie inside it as corners x1, y1, x2, y2; COCO has x, y, width, height"
    )


def _other_polygons(extents: Sequence[tuple]) -> str:
    """The boxes of objects with polygons are those of their corners instead."""
    if len(extents) < _FEW:
        return ""
    as_stands = sum(_close(box, around) for box, around in extents)
    as_corners = sum(
        _close(box, [x, y, x + w, y + h]) for box, (x, y, w, h) in extents if x > 2 or y > 2
    )
    if as_corners < _NEARLY_ALL * len(extents) or as_stands > len(extents) / 2:
        return ""
    return (
        f"{as_corners} of {len(extents)} boxes are the corners x1, y1, x2, y2 of their own "
        "polygons; COCO has x, y, width, height"
    )


def _crowds(found) -> str:
    """CVAT and Datumaro mark every painted mask so. Of COCO's own boxes one in a hundred is."""
    count = len(found.annotations)
    if not _MANY * count < found.crowds < count:
        return ""
    return (
        f"{found.crowds} of {count} boxes are crowd regions (iscrowd 1), which are neither trained "
        "on nor counted; some tools write iscrowd 1 for every painted mask"
    )


def _close(box: List[float], other: List[float]) -> bool:
    return bad_box(box, 1e9, 1e9) is None and all(abs(a - b) <= 2 for a, b in zip(box, other))
