"""Check the masks of a COCO-format JSON: polygons or run-length encoding (RLE)."""

import math

from ..errors import UserError

__all__ = ["MASK_FORMATS", "check_mask", "check_structure", "no_polygon"]

MASK_FORMATS = ("polygon", "bitmask")  # of INPUT.MASK_FORMAT


def _is_polygon(polygon: list) -> bool:
    """At least three points; Detectron2 drops the others."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def check_structure(where: str, segmentation) -> None:
    """Whether Detectron2 can read the field at all, masks wanted or not; None and [] are fine.

    Raises:
        UserError: neither a list of polygons nor RLE. ``where`` names file and annotation.
    """
    if not segmentation:
        return
    if isinstance(segmentation, dict):
        good = {"size", "counts"} <= segmentation.keys()
    else:
        good = isinstance(segmentation, list) and all(isinstance(p, list) for p in segmentation)
    if not good:
        raise UserError(
            f"{where} has segmentation {str(segmentation)[:60]}; expected polygons "
            "[[x, y, x, y, x, y, ...], ...] or RLE {'size': [height, width], 'counts': ...}"
        )


def no_polygon(segmentation) -> bool:
    """Polygons, but none with three points: Detectron2 leaves such an object out, box and all."""
    return (
        isinstance(segmentation, list)
        and bool(segmentation)
        and not any(_is_polygon(polygon) for polygon in segmentation)
    )


def check_mask(where: str, entry: dict, image: dict, mask_format: str) -> None:
    """Whether an annotation that passed the checks above has a mask that can be trained on.

    Args:
        entry, image: of the JSON.   mask_format: INPUT.MASK_FORMAT, "polygon" or "bitmask". Crowd
            regions may always be RLE, as in COCO: they are not trained on.
    Raises:
        UserError: no mask, one that is not numbers or of another size than its image, or RLE where
            polygons are wanted; says what to set.
    """
    segmentation = entry.get("segmentation")
    if not segmentation:
        raise UserError(
            f"{where} has no segmentation, but MODEL.MASK_ON needs a mask for every box; to train "
            "on boxes alone set MODEL.MASK_ON False"
        )
    if isinstance(segmentation, list):
        if not _all_numbers(segmentation):
            raise UserError(f"{where} has a polygon with something else than finite numbers")
        return
    size = [image["height"], image["width"]]
    if list(segmentation["size"]) != size:
        raise UserError(
            f"{where} has an RLE mask of size {segmentation['size']}, but its image has "
            f"[height, width] {size}"
        )
    if mask_format == "polygon" and not entry.get("iscrowd"):
        raise UserError(
            f"{where} has an RLE mask, which INPUT.MASK_FORMAT polygon cannot hold; set "
            "INPUT.MASK_FORMAT bitmask"
        )


def _all_numbers(polygons: list) -> bool:
    try:
        return math.isfinite(sum(map(sum, polygons)))
    except TypeError:
        return False
