"""Parts of a dataset that are set apart: near duplicates stay together, no class is lost."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from PIL import Image

from fgd_inputs.coco import CocoFile
from fgd_inputs.image_files import BadImage, open_image

from ..errors import UserError
from .survey import Survey

SHARE = 0.15  # of the images, for validation and for test each
_GRID = (17, 16)  # width, height of a thumbnail: 16 differences in each of 16 rows
_NOISE = 2.0  # grey levels: a smaller difference is none, so that flat regions are alike
# Bits of 512 in which near duplicates differ at most. A photograph of blood cells or nuclei that is
# made smaller, stored as JPEG of quality 40 or made a tenth brighter differs in 19, two different
# ones in 32 or more.
_BITS = 19
_LEVELS = 20.0  # grey levels by which their means do
_MANY = 20_000  # images: of more, only those of equal hash are grouped
_TRIES = 20  # shuffles, of which the one that loses fewest classes is taken
_SEED = 0


class Looks(NamedTuple):
    """N images: (N, 512) bits of a difference hash, (N,) mean grey; why others cannot be used."""

    bits: np.ndarray
    grey: np.ndarray
    bad: Dict[int, str]


def look(images: Sequence[dict]) -> Looks:
    """Read every image of a `CocoFile` once; a bad one has no bit set."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        thumbs = list(pool.map(_thumbnail, images))
    bad = {i: x for i, x in enumerate(thumbs) if isinstance(x, str)}
    blank = np.zeros(_GRID[::-1])
    grid = np.stack([blank if i in bad else x for i, x in enumerate(thumbs)])
    steps = np.diff(grid, axis=2)
    bits = np.stack([steps > _NOISE, steps < -_NOISE], axis=1)
    return Looks(bits.reshape(len(grid), -1), grid.mean((1, 2)), bad)


def _thumbnail(image: dict) -> object:
    """(16, 17) grey levels, or why the image cannot be used."""
    try:
        with open_image(image["file"], image["file"]) as opened:
            if opened.size != (image["width"], image["height"]):
                sizes = *opened.size, image["width"], image["height"]
                return "image {} is {}x{}, the JSON says {}x{}".format(image["file"], *sizes)
            return np.asarray(opened.convert("RGB").convert("L").resize(_GRID, Image.BOX), float)
    except (BadImage, OSError) as error:
        return str(error)


def groups(looks: Looks) -> np.ndarray:
    """(N,) the number of each image's group: near duplicates, and near duplicates of these."""
    count = len(looks.bits)
    owner = np.arange(count)
    if count > _MANY:
        return np.unique(np.packbits(looks.bits, axis=1), axis=0, return_inverse=True)[1]
    signs = looks.bits.astype(np.float32)
    ones = signs.sum(1)
    for i in range(count):  # a row at a time: all pairs of many images would not fit in memory
        apart = ones[i] + ones[i:] - 2 * (signs[i:] @ signs[i])
        close = (apart <= _BITS) & (np.abs(looks.grey[i:] - looks.grey[i]) <= _LEVELS)
        for j in np.flatnonzero(close)[1:] + i:
            owner[owner == owner[j]] = owner[i]
    return np.unique(owner, return_inverse=True)[1]


def split(survey: Survey, group: np.ndarray, names: Sequence[str]) -> Dict[str, np.ndarray]:
    """Indices of images by part: "train", and those of ``names``, of `SHARE` of the images each.

    Args:
        group: (N,) of `groups`; -1 for images that may not leave the training set.
    Raises:
        UserError: near duplicates leave too little to choose from.
    """
    images, classes = len(group), len(survey.found.categories)
    present = np.zeros((images, classes), bool)
    present[survey.owners, survey.labels] = True
    target = max(1, round(SHARE * images))
    generator, best = np.random.default_rng(_SEED), None
    for _ in range(_TRIES if names else 1):
        parts = _fill(group, names, target, generator)
        small = sum(
            len(parts[name]) < target / 2 or not present[parts[name]].any() for name in names
        )
        lost = [int((present.any(0) & ~present[own].any(0)).sum()) for own in parts.values()]
        badness = (small, lost[0], sum(lost), images - len(parts["train"]))
        if best is None or badness < best[0]:
            best = badness, parts
    (small, *_), parts = best
    if small or len(parts["train"]) < images / 2 or not present[parts["train"]].any():
        count = len(np.unique(group[group >= 0]))
        raise UserError(
            f"dataset JSON {survey.found.path}: its {images} images, in {count} groups of near "
            f"duplicates, are too few to set {' and '.join(names)} images with boxes apart; give "
            f"{' and '.join(f'--{name}' for name in names)}"
        )
    return parts


def _fill(
    group: np.ndarray, names: Sequence[str], target: int, generator: np.random.Generator
) -> Dict[str, np.ndarray]:
    numbers, sizes = np.unique(group[group >= 0], return_counts=True)
    order = generator.permutation(len(numbers))
    part, taken = np.full(len(group), -1), set()
    for index in range(len(names)):
        room = target
        for i in order:
            if i not in taken and sizes[i] <= room:
                part[group == numbers[i]] = index
                taken.add(i)
                room -= sizes[i]
    return {
        "train": np.flatnonzero(part < 0),
        **{name: np.flatnonzero(part == index) for index, name in enumerate(names)},
    }


def part_json(found: CocoFile, chosen: Sequence[int], folder: str, what: str) -> bytes:
    """A COCO JSON of some of the images, named relative to ``folder``, as they were read."""
    images = [found.images[i] for i in chosen]
    ids = {image["id"] for image in images}
    content = {
        "info": {"description": f"{what} of {found.path}, python -m fgd.start"},
        "images": [
            {
                **{key: image[key] for key in ("id", "height", "width")},
                "file_name": os.path.relpath(image["file"], folder),
            }
            for image in images
        ],
        "annotations": [x for x in found.annotations if x["image_id"] in ids],
        "categories": found.categories,
    }
    return json.dumps(content).encode()


def lost_classes(survey: Survey, parts: Dict[str, np.ndarray]) -> List[Tuple[str, List[str]]]:
    """Parts in which a class that has boxes has none, and which."""
    ret = []
    for name, own in parts.items():
        here = np.unique(survey.labels[np.isin(survey.owners, own)])
        missing = np.setdiff1d(np.unique(survey.labels), here)
        ret += [(name, [survey.found.class_names[i] for i in missing])] if len(missing) else []
    return ret
