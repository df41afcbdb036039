"""The field ``segmentation`` of a COCO annotation: polygons or run-length encoding (RLE)."""

import math
from typing import Any, List, NamedTuple, Optional, Sequence, Union

from .errors import UserError
from .json_file import number, shown, whole

POLYGON, BITMASK = "polygon", "bitmask"  # values of INPUT.MASK_FORMAT
MASK_FORMATS = (POLYGON, BITMASK)


class Mask(NamedTuple):
    """A mask that can be used, as the file has it, and its area in pixels."""

    segmentation: Union[List[List[float]], dict]
    area: float


def read_mask(where: str, value: Any, height: int, width: int) -> Optional[Mask]:
    """A mask of an image of that size; None where the annotation states none, or none with an area.

    null and [] state none. Of polygons, those with fewer than three points count for nothing.

    Args:
        where: file and annotation, for messages.
    Raises:
        UserError: neither polygons of finite numbers nor an RLE of the image's size.
    """
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        return Mask(value, _rle_area(where, value, height, width))
    if not isinstance(value, list) or not all(isinstance(part, list) for part in value):
        raise UserError(
            f"{where} has segmentation {shown(value)}; expected polygons "
            "[[x, y, x, y, x, y, ...], ...] or RLE {'size': [height, width], 'counts': ...}"
        )
    polygons = []
    for part in value:
        points = [number(v) for v in part]
        if not all(v is not None and math.isfinite(v) for v in points):
            raise UserError(f"{where} has a polygon with something else than finite numbers")
        if len(points) >= 6 and len(points) % 2 == 0:
            polygons.append(points)
    if not polygons:
        return None
    return Mask(polygons, sum(map(polygon_area, polygons)))


def states_mask(value: Any) -> bool:
    """Whether a segmentation is more than null or []."""
    return value is not None and value != []


def polygon_area(points: Sequence[float]) -> float:
    """Of x, y, x, y, ...: |sum of x_i * y_(i+1) - x_(i+1) * y_i| / 2."""
    xs, ys = points[::2], points[1::2]
    following = zip(xs[1:] + xs[:1], ys[1:] + ys[:1])
    return abs(sum(x * y2 - x2 * y for x, y, (x2, y2) in zip(xs, ys, following))) / 2


def extent(segmentation: List[List[float]]) -> List[float]:
    """x, y, width, height of the box around polygons."""
    xs = [x for polygon in segmentation for x in polygon[::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _rle_area(where: str, rle: dict, height: int, width: int) -> float:
    size = rle.get("size")
    if not isinstance(size, list) or [whole(v) for v in size] != [height, width]:
        raise UserError(
            f"{where} has an RLE mask of size {shown(size)}, but its image has [height, width] "
            f"{[height, width]}"
        )
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = decode_counts(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise UserError(
            f"{where} has an RLE mask with counts {shown(rle.get('counts'))}; expected lengths of "
            "runs, or their compressed text"
        )
    if sum(counts) != height * width:
        raise UserError(
            f"{where} has an RLE mask of {sum(counts)} pixels, but its image has {height * width}"
        )
    return float(sum(counts[1::2]))


def decode_counts(text: str) -> Optional[List[int]]:
    """COCO's compressed text → lengths of runs, background first; None where it is none.

    Each number is written in groups of five bits, lowest first, as characters from "0" on; bit 6
    says that another group follows, the last group's fifth bit is the sign. From the third run on
    it is the difference from the run before the last.
    """
    counts: List[int] = []
    position = 0
    while position < len(text):
        value = shift = 0
        more = True
        while more:
            if position >= len(text) or shift > 60:
                return None
            code = ord(text[position]) - 48
            if not 0 <= code < 64:
                return None
            value |= (code & 31) << shift
            more = bool(code & 32)
            position += 1
            shift += 5
            if not more and code & 16:
                value |= -1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts
