"""Batches to verify a graph on: drawn images, or the user's, in every shape it must take."""

from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from deploy.serving.preprocess import load_image, prepare
from deploy.spec import ModelSpec
from fgd_inputs.file_names import find_images

_SMALLEST = 32  # pixels, of the smallest image tried
_MOST_IMAGES = 30  # of the user's, evenly spaced: each is run by Detectron2 as well


class Batch(NamedTuple):
    """images (B, 3, H, W) of the spec's dtype, noise in the padding; image_sizes (B, 2) int32."""

    images: np.ndarray
    image_sizes: np.ndarray


def verification_batches(
    spec: ModelSpec, images: Optional[Sequence[np.ndarray]] = None
) -> List[Batch]:
    """Landscape, portrait, smallest, almost blank; alone and three ragged ones together.

    For a canvas that is always filled, images that are smaller by less than its divisibility.

    Args:
        images: prepared pixels (h, w, 3) uint8 that fit the canvas; they are used beside drawn
            ones, each alone and in ragged threes.
    Returns:
        Batches of 1 and, unless the batch is fixed to 1, of 3; the first one fills the canvas.
    """
    rng = np.random.default_rng(0)
    height, width = _largest(spec)
    if spec.filled:
        less = spec.size_divisibility - 1
        shapes = [(height - a, width - b) for a in (0, less) for b in (0, less)]
    else:
        shapes = [
            (height, width),
            (height, max(width // 2, 1)),
            (max(2 * height // 3, 1), width),
            (min(_SMALLEST, height), min(_SMALLEST, width)),
        ]
    drawn = [draw_scene(rng, shape) for shape in shapes]
    # Not one value everywhere: of equal scores in whole rows any may be kept, in Detectron2 too.
    blank = np.random.default_rng(1).integers(112, 117, (height, width, 3), np.uint8)
    alone = [*drawn, blank, *(images or [])]
    batches = [make_noisy_batch(rng, [image], spec) for image in alone]
    if spec.dynamic != "none":
        ragged = [drawn[0], drawn[1], blank, *drawn[2:], *(images or [])]
        batches += [make_noisy_batch(rng, three, spec) for three in _in_threes(ragged)]
    return batches


def read_images(folder, spec: ModelSpec) -> List[np.ndarray]:
    """Up to 30 images of a folder as `verification_batches` takes them.

    Raises:
        UserError: no such folder, no image in it, or one that cannot be read.
    """
    files = find_images([folder])
    chosen = np.linspace(0, len(files) - 1, min(len(files), _MOST_IMAGES)).round().astype(int)
    return [prepare(load_image(files[i]), spec) for i in chosen]


def _largest(spec: ModelSpec) -> Tuple[int, int]:
    """(height, width) of the fixed canvas, or of an image as large as the resizing makes it."""
    if spec.height is not None:
        return spec.height, spec.width
    return spec.min_size or 4 * _SMALLEST, spec.max_size if spec.min_size else 5 * _SMALLEST


def _in_threes(images: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    for start in range(0, len(images) - 2, 3):
        yield images[start : start + 3]


def make_noisy_batch(rng, images: Sequence[np.ndarray], spec: ModelSpec) -> Batch:
    """Images at the top left of one canvas; the padding is noise, which must have no effect."""
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    height, width = spec.height, spec.width
    if height is None:
        step = spec.size_divisibility
        height, width = (int(-(-side // step) * step) for side in sizes.max(axis=0))
    batch = rng.integers(0, 256, (len(images), 3, height, width)).astype(spec.input_dtype)
    for canvas, image in zip(batch, images):
        canvas[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return Batch(batch, sizes)


def draw_scene(rng, shape: Tuple[int, int], objects: int = 6) -> np.ndarray:
    """(h, w, 3) uint8: filled boxes and discs of one colour each on a smooth background."""
    height, width = shape
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = rng.uniform(0, 2 * np.pi, (3, 3))
    image = np.stack(
        [
            128 + 50 * np.sin(waves[c, 0] + 4 * rows / height + waves[c, 1] * columns / width)
            for c in range(3)
        ],
        axis=-1,
    )
    for i in range(objects):
        radius = rng.uniform(0.06, 0.25) * min(height, width) * rng.uniform(0.7, 1.4, 2)
        center = rng.uniform(0.1, 0.9, 2) * (height, width)
        distance = np.abs(np.stack([rows - center[0], columns - center[1]])) / radius[:, None, None]
        inside = distance.max(axis=0) < 1 if i % 2 else (distance**2).sum(axis=0) < 1
        image[inside] = rng.integers(0, 256, 3)
    return image.round().clip(0, 255).astype(np.uint8)
