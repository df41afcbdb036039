"""Pictures of detections: boxes, masks, class names, scores. numpy and Pillow only."""

import colorsys
from typing import Iterable, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fgd_inputs.names import one_line

_LONGEST_NAME = 60  # characters of a class name that are drawn
_LONGEST_SIDE = 480  # pixels; smaller images are enlarged so that the text can be read
_GOLDEN_RATIO = 0.618034


def class_colour(label: int) -> Tuple[int, int, int]:
    """RGB 0..255 of a class; the same in every picture, neighbours far apart in hue."""
    hue = (0.33 + label * _GOLDEN_RATIO) % 1.0
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.9, 1.0))


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    classes: Sequence[str],
    scores: Optional[Sequence[float]] = None,
    masks: Iterable[np.ndarray] = (),
) -> Image.Image:
    """Draw boxes, and masks in their class's colour beneath them, on a copy of the image.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (R, 4) xyxy in pixels of `image`; R may be 0.
        labels: (R,) indices into `classes`.
        scores: (R,) in [0, 1]; None for ground truth. The best end up on top.
        masks: (H, W) bool, one per box, or none at all.
    Returns:
        RGB picture; an image under 480 pixels is enlarged by a whole factor.
    """
    height, width = image.shape[:2]
    zoom = -(-_LONGEST_SIDE // max(height, width))
    picture = Image.fromarray(_tinted(image[:, :, ::-1], masks, labels))
    if zoom > 1:
        picture = picture.resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    longest = max(picture.size)
    font = ImageFont.load_default(size=max(13, round(longest / 45)))
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    for i in order:
        text = one_line(classes[labels[i]], _LONGEST_NAME)
        text += "" if scores is None else f" {scores[i]:.2f}"
        _draw_box(draw, np.asarray(boxes[i], float) * zoom, text, class_colour(labels[i]), font)
    return picture


def _tinted(image: np.ndarray, masks: Iterable[np.ndarray], labels: Sequence[int]) -> np.ndarray:
    """A copy of the RGB image, half of every mask's pixels the colour of its class."""
    pixels = np.array(image)
    for mask, label in zip(masks, labels):
        colour = np.array(class_colour(label))
        pixels[mask] = ((pixels[mask].astype(int) + colour) // 2).astype(np.uint8)
    return pixels


def _draw_box(draw: ImageDraw.ImageDraw, box, text: str, colour, font) -> None:
    """One rectangle, with its label above it, or inside where there is no room above."""
    canvas_width, canvas_height = draw.im.size
    line = max(2, round(max(canvas_width, canvas_height) / 300))
    x1, y1, x2, y2 = box
    # the last pixel is size - 1: an edge drawn at `size` would not be seen
    x2, y2 = min(x2, canvas_width - 1), min(y2, canvas_height - 1)
    draw.rectangle((min(x1, x2), min(y1, y2), x2, y2), outline=colour, width=line)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    text_width, text_height = right - left + 6, bottom - top + 6
    x = min(max(x1, 0), max(canvas_width - text_width, 0))
    y = y1 - text_height if y1 >= text_height else max(y1, 0)
    draw.rectangle((x, y, x + text_width, y + text_height), fill=colour)
    brightness = np.dot(colour, (0.299, 0.587, 0.114))
    ink = (0, 0, 0) if brightness > 110 else (255, 255, 255)
    draw.text((x + 3 - left, y + 3 - top), text, fill=ink, font=font)
