"""Pasting is Detectron2's, pixel by pixel; the RLE is pycocotools', letter by letter."""

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from deploy.serving.paste import encode_rle, paste_mask

SIZE = (60, 90)
BOXES = [
    [10.3, 5.7, 50.2, 40.9],
    [0, 0, 90, 60],  # the whole image
    [3.2, 4.1, 3.9, 4.4],  # less than a pixel
    [80.5, 50.5, 90, 60],  # at the last corner
    [0, 20.1, 90, 21.0],  # thin
    [12, 8, 26, 22],  # one pixel a cell
]


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("cells", [14, 28])
def test_pasted_pixels_are_detectron2s(box, cells):
    rng = np.random.default_rng(0)
    masks = np.stack([smooth(rng, cells), rng.random((cells, cells), np.float32)])
    boxes = torch.tensor([box] * 2, dtype=torch.float32)
    expected = paste_masks_in_image(torch.from_numpy(masks), boxes, SIZE).numpy()
    for mask, wanted in zip(masks, expected, strict=True):
        actual = paste_mask(mask, np.array(box, np.float32), SIZE)
        assert actual.shape == SIZE and actual.dtype == bool
        assert (actual != wanted).sum() <= wanted.sum() / 1000  # float rounding at exactly 0.5
    assert cells != 28 or box[2] - box[0] < 5 or expected.any()


def smooth(rng, cells):
    """A disc with a soft edge, off the centre."""
    y, x = np.mgrid[:cells, :cells] / cells - rng.uniform(0.4, 0.6, (2, 1, 1))
    return (1 / (1 + np.exp(30 * (np.hypot(x, y) - 0.35)))).astype(np.float32)


def test_a_hand_made_mask():
    """Two cells on four pixels: between the centres of the cells the value is interpolated."""
    mask = np.float32([[0.8, 0], [0.8, 0]])
    pasted = paste_mask(mask, [2, 1, 6, 5], (6, 8))
    # columns 2..5 take 0.75, 0.75, 0.25, 0 of the left cells; rows 1 and 4 another 0.75 of that
    assert pasted.sum(axis=0).tolist() == [0, 0, 2, 2, 0, 0, 0, 0]
    assert pasted[:, 2].tolist() == [False, False, True, True, False, False]


def check(mask):
    assert encode_rle(mask) == {
        "size": list(mask.shape),
        "counts": coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode(),
    }


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 999))
def test_rle_is_pycocotools(height, width, share, seed):
    check(np.random.default_rng(seed).random((height, width)) < share)


@pytest.mark.parametrize("value", [False, True])
def test_rle_of_long_runs(value):
    mask = np.full((700, 900), value)
    check(mask)
    mask[100:650, 3:880] = not value
    check(mask)
