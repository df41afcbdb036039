"""Masks from the grid of their box to pixels of the image, and as COCO's RLE. numpy only."""

from typing import Dict, Tuple

import numpy as np

THRESHOLD = 0.5  # of a probability, for a pixel to belong to the object


def paste_mask(mask: np.ndarray, box: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """One mask on the whole image, as Detectron2's `paste_masks_in_image` does on a CPU.

    A pixel's centre is looked up bilinearly in the mask, whose cells have their values at their
    centres and 0 around them.

    Args:
        mask: (M, M) float32 probabilities over the box.
        box: x1, y1, x2, y2 in pixels of the image, not empty.
        size: (height, width) of the image.
    Returns:
        (height, width) bool, False outside the box.
    """
    image = np.zeros(size, bool)
    x1, y1, x2, y2 = np.asarray(box, np.float32)
    left, right = max(int(np.floor(x1)) - 1, 0), min(int(np.ceil(x2)) + 1, size[1])
    top, bottom = max(int(np.floor(y1)) - 1, 0), min(int(np.ceil(y2)) + 1, size[0])
    rows = _weights(np.arange(top, bottom), y1, y2, mask.shape[0])
    columns = _weights(np.arange(left, right), x1, x2, mask.shape[1])
    image[top:bottom, left:right] = rows @ mask @ columns.T >= THRESHOLD
    return image


def _weights(pixels: np.ndarray, start: np.float32, end: np.float32, cells: int) -> np.ndarray:
    """(P, cells) how much of each cell a pixel's centre takes; in float32, as in Detectron2."""
    relative = (pixels.astype(np.float32) + np.float32(0.5) - start) / (end - start) * 2 - 1
    position = ((relative + 1) * cells - 1) / 2  # in cells; centres are whole numbers
    distance = np.abs(position[:, None] - np.arange(cells, dtype=np.float32))
    return np.maximum(1 - distance, 0)


def encode_rle(mask: np.ndarray) -> Dict:
    """A bitmap (H, W) as COCO's compressed RLE, what `pycocotools.mask.encode` gives.

    Returns:
        {"size": [H, W], "counts": text}: lengths of runs down the columns, of 0 and 1 in turn.
    """
    pixels = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    if pixels.size and pixels[0]:
        changes = np.concatenate([[0], changes])  # a first run of 0 zeros
    bounds = np.concatenate([[0], changes, [pixels.size]])
    counts = np.diff(bounds).tolist() if pixels.size else [0]
    differences = counts[:3] + [a - b for a, b in zip(counts[3:], counts[1:])]
    return {"size": list(mask.shape), "counts": "".join(map(_varint, differences))}


def _varint(value: int) -> str:
    """Five bits a character, lowest first; the sixth says that more follow; two's complement."""
    text = ""
    while True:
        bits, value = value & 0x1F, value >> 5
        done = value == (-1 if bits & 0x10 else 0)
        text += chr(48 + (bits if done else bits | 0x20))
        if done:
            return text
