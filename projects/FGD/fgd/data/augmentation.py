"""Augmentation by what a sample shows: noise where all objects are small, crops where some are not.

Source: IKD (ACM MM 2023, arXiv 2209.09841), its sample-specific data augmentation. Small objects
are learnt from high frequencies, so noise there, and a crop would lose them; large ones are learnt
from shape and context, so a crop there, and no noise.
"""

from typing import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from fvcore.transforms.transform import BlendTransform, CropTransform

from ..errors import UserError

# Of a crop that shows no object. One that leaves at least 0.8 of both sides shows objects nearly
# always, so more would change nothing.
MOST_DRAWS = 20
EMPTY = 1e-5  # pixels: boxes that are not wider and higher are empty to Detectron2


def add_augmentation_config(cfg: CfgNode) -> None:
    """Add INPUT.SAMPLE_SPECIFIC and INPUT.PLAIN_FROM, in place; all off."""
    node = cfg.INPUT.SAMPLE_SPECIFIC = type(cfg)()
    # Before resizing: noise on images whose objects are all small, in NOISE_PROB of the draws.
    # After resizing and flipping: a random crop of all others. An image without objects is all
    # small.
    node.ENABLED = False
    # An object is small if its box covers less, in square pixels of the image file.
    node.SMALL_AREA = 1024.0
    node.NOISE_PROB = 0.3
    # Standard deviation of the noise in each channel of a pixel, as part of its range.
    node.NOISE_SIGMA = 0.08
    # Each side of the crop is drawn from this part of the image's to all of it; 1 = no crop.
    node.CROP = 0.8
    # From this iteration on batches are plain: without SAMPLE_SPECIFIC and without second images
    # (DATASETS.TRAIN_SECOND_IMAGES), so that whatever is learnt from these ends too. 0 = never.
    cfg.INPUT.PLAIN_FROM = 0


def check_augmentation(cfg: CfgNode) -> None:
    """Raise UserError for values that cannot work: key, what was found, what is allowed."""
    key, node = "INPUT.SAMPLE_SPECIFIC", cfg.INPUT.SAMPLE_SPECIFIC
    if not 0 <= node.NOISE_PROB <= 1:
        raise UserError(f"{key}.NOISE_PROB: {node.NOISE_PROB} is not a probability")
    if not 0 < node.CROP <= 1:
        raise UserError(f"{key}.CROP: {node.CROP} is not above 0 and at most 1")
    for name in ("SMALL_AREA", "NOISE_SIGMA"):
        if not 0 <= node[name] < float("inf"):
            raise UserError(f"{key}.{name}: {node[name]} is not a finite number >= 0")
    if cfg.INPUT.PLAIN_FROM < 0:
        raise UserError(f"INPUT.PLAIN_FROM: {cfg.INPUT.PLAIN_FROM} is not an iteration, or 0")


class SampleInput(T.AugInput):
    """What augmentations see of a sample; they transform image and boxes together.

    Args:
        image: (H, W, C) uint8. boxes: (R, 4) XYXY in its pixels, without crowds.
        all_small: whether all objects of the image file are small.
    """

    def __init__(self, image: np.ndarray, boxes: np.ndarray, all_small: bool):
        super().__init__(image, boxes=boxes)
        self.all_small = all_small


def sample_input(image: np.ndarray, annotations: Sequence[dict], small_area: float) -> SampleInput:
    """Of an image file as it is and its annotations."""
    boxes = [
        BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS)
        for x in annotations
        if not x.get("iscrowd", 0)
    ]
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return SampleInput(image, boxes, bool((areas < small_area).all()))


class NoiseWhereSmall(T.Augmentation):
    """Gaussian noise on the whole of an image whose objects are all small.

    The strength is severity 1 of ImageNet-C's, whose code also cuts the result to whole numbers.

    Args:
        prob: of an image to be looked at. sigma: standard deviation, as part of 255.
    """

    def __init__(self, prob: float, sigma: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray, all_small: bool) -> T.Transform:
        chosen = self._rand_range() < self.prob
        if not (chosen and all_small):
            return T.NoOpTransform()
        noise = np.random.normal(scale=255 * self.sigma, size=image.shape)
        return BlendTransform(noise.astype(np.float32), src_weight=1.0, dst_weight=1.0)


class Window(CropTransform):
    """A crop that needs no shapely.

    Polygons are moved and not cut: all that Detectron2 does with them, turning them into pixels,
    stops at the borders of the image or box anyway.
    """

    def apply_polygons(self, polygons: list) -> list:
        return [self.apply_coords(polygon) for polygon in polygons]


class CropWhereLarge(T.RandomCrop):
    """A random crop of an image of which not all objects are small; one object at least is in it.

    A crop without any is drawn again, at most `MOST_DRAWS` times; then the image stays whole.

    Args:
        smallest: each side is drawn from this part of the image's to all of it, independently.
    """

    def __init__(self, smallest: float):
        super().__init__("relative_range", (smallest, smallest))

    def get_transform(self, image: np.ndarray, boxes: np.ndarray, all_small: bool) -> T.Transform:
        if all_small:
            return T.NoOpTransform()
        for _ in range(MOST_DRAWS):
            crop = super().get_transform(image)
            sides = np.array([crop.w, crop.h] * 2)
            inside = (boxes - [crop.x0, crop.y0] * 2).clip(0, sides)
            if ((inside[:, 2:] - inside[:, :2]) > EMPTY).all(axis=1).any():
                return Window(crop.x0, crop.y0, crop.w, crop.h)
        return T.NoOpTransform()
