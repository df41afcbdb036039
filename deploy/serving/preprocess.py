"""From image files to the graph's input: reading, resizing, padding. numpy and Pillow only.

Follows Detectron2 step by step (`read_image`, `ResizeShortestEdge`, `ResizeTransform`), so that a
client without Detectron2 feeds the network the pixels it was trained on.
"""

from pathlib import Path
from typing import Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from deploy.errors import UserError
from deploy.spec import ModelSpec, fills
from fgd_inputs.image_files import MAX_PIXELS, open_image, upright

ImageSource = Union[str, Path, Image.Image, np.ndarray]


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pixels of one image, upright, as Detectron2's `read_image(path, "BGR")` gives them.

    Args:
        source: a path (see `fgd_inputs.image_files.FORMATS`; first frame), a PIL image, or an array
            (H, W, 3) uint8 in BGR order, which is passed through.
        max_pixels: larger images are refused before they are decoded. Pillow refuses twice its
            own `PIL.Image.MAX_IMAGE_PIXELS` as well, whatever this says.
    Returns:
        (H, W, 3) uint8, BGR, 0..255. EXIF orientation is applied, alpha is dropped, grey is
        repeated, palette and CMYK are converted; of 16-bit colour the high bytes are taken. 16-bit
        grey, 32-bit and float images are refused, where Detectron2 clips them at 255.
    Raises:
        UserError: missing, damaged, too large, or more than 8 bits per channel; names the source.
    """
    if isinstance(source, np.ndarray):
        return _check_array(source)
    if isinstance(source, Image.Image):
        return _pixels(upright(source, f"PIL image {source.size}", max_pixels))
    with open_image(source, str(source), max_pixels) as image:
        return _pixels(image)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))[:, :, ::-1]


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise UserError(
            f"image array is {image.dtype} {image.shape}; pass (H, W, 3) uint8 in BGR order, 0..255"
        )
    return image


def resized_shape(
    height: int, width: int, min_size: int, max_size: int, canvas: Optional[Tuple[int, int]] = None
) -> Tuple[int, int]:
    """(height, width) in pixels after Detectron2's test-time resizing.

    The shortest edge becomes `min_size` unless the longest would then exceed `max_size`; rounding
    is `int(x + 0.5)`; `min_size` 0 keeps the size. Where the result exceeds a fixed `canvas`
    (H, W), say a portrait image on a landscape canvas, the image is shrunk further until it fits;
    it is never cropped. A very thin image may get a side of 0: the caller must refuse it.
    """
    new_h, new_w = float(height), float(width)
    if min_size > 0:
        scale = min_size / min(height, width)
        # the short edge is set, not multiplied: the rule must give min_size exactly
        new_h, new_w = (min_size, scale * width) if height < width else (scale * height, min_size)
        if max(new_h, new_w) > max_size:
            scale = max_size / max(new_h, new_w)
            new_h, new_w = new_h * scale, new_w * scale
    new_h, new_w = int(new_h + 0.5), int(new_w + 0.5)
    if canvas is not None and (new_h > canvas[0] or new_w > canvas[1]):
        scale = min(canvas[0] / height, canvas[1] / width)
        new_h = min(int(height * scale + 0.5), canvas[0])
        new_w = min(int(width * scale + 0.5), canvas[1])
    return new_h, new_w


def resize(image: np.ndarray, shape: Tuple[int, int]) -> np.ndarray:
    """PIL's bilinear filter on uint8, as Detectron2 does. (H, W, 3) -> (*shape, 3)."""
    pil_image = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(pil_image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def prepare(image: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """One image at the size and in the channel order that the graph expects.

    Args:
        image: (H, W, 3) uint8 BGR.
    Returns:
        (h, w, 3) uint8 in `spec.input_format` order; fits the canvas if the spec fixes one.
    Raises:
        UserError: the image is so thin that a side would shrink to nothing, it would become larger
            than `MAX_PIXELS`, or it does not fill the canvas although the graph was exported for
            images that do.
    """
    canvas = None if spec.height is None else (spec.height, spec.width)
    height, width = image.shape[:2]
    shape = resized_shape(height, width, spec.min_size, spec.max_size, canvas)
    if min(shape) < 1:
        raise UserError(
            f"image {height}x{width} (height x width) is too thin: it would be resized "
            f"to {shape[0]}x{shape[1]}"
        )
    if shape[0] * shape[1] > max(MAX_PIXELS, height * width):
        raise UserError(
            f"image {height}x{width} (height x width) would be resized to {shape[0]}x{shape[1]}, "
            f"more than {MAX_PIXELS} pixels, by min_size {spec.min_size} and max_size "
            f"{spec.max_size}"
        )
    if spec.filled and not fills(shape, canvas, spec.size_divisibility):
        raise UserError(
            f"image {height}x{width} (height x width) becomes {shape[0]}x{shape[1]} and does not "
            f"fill the canvas of {spec.height}x{spec.width}; export without --filled"
        )
    return resize(image if spec.input_format == "BGR" else image[:, :, ::-1], shape)


def make_batch(images: Sequence[np.ndarray], spec: ModelSpec) -> Tuple[np.ndarray, np.ndarray]:
    """Place prepared images at the top left of one canvas each; the rest is 0.

    Args:
        images: (h, w, 3) uint8 arrays from `prepare`, at least one; sizes may differ.
    Returns:
        images (B, 3, H, W) of `spec.input_dtype`, and image_sizes (B, 2) int32 as (h, w). The
        canvas is the spec's, or the largest height and width rounded up to its divisibility.
    """
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    if spec.height is None:
        step = max(spec.size_divisibility, 1)
        height, width = (int(-(-side // step) * step) for side in sizes.max(axis=0))
    else:
        height, width = spec.height, spec.width
    batch = np.zeros((len(images), 3, height, width), spec.input_dtype)
    for canvas, image, (h, w) in zip(batch, images, sizes, strict=True):
        canvas[:, :h, :w] = image.transpose(2, 0, 1)
    return batch, sizes
