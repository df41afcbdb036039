"""What the boxes of a dataset are like, and the input size and pyramid levels that they ask for."""

from collections import Counter
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np

from fgd_inputs.coco import CocoFile
from fgd_inputs.names import one_line

from ..errors import UserError

OBJECT = 20  # pixels: median side of the smallest class at the input size
LEAST, MOST = 224, 800  # pixels of the short side, unless the images are smaller
_STEP = 16
SMALL = 32  # COCO: an object is small if its area is below the square of it
MAX_STRIDE = 32  # of a backbone's last stage


class Survey(NamedTuple):
    """The single objects of a dataset, R boxes on N images; crowd regions are left out.

    Attributes:
        images: (N, 2) height, width. boxes: (R, 4) x, y, width, height, in the images' pixels.
        labels: (R,) class. owners: (R,) which of the images.
    """

    found: CocoFile
    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    owners: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """(R,) the side of the square of a box's area, over the short side of its image."""
        return np.sqrt(self.boxes[:, 2:].prod(1)) / self.images[self.owners].min(1)

    def sides(self, size: "InputSize") -> np.ndarray:
        """(R,) side of the square of a box's area in the input, in pixels."""
        return np.sqrt(self.scaled(size)[:, 2:].prod(1))

    def scaled(self, size: "InputSize") -> np.ndarray:
        """(R, 4) boxes in pixels of the input."""
        return self.boxes * size.scales(self.images)[self.owners, None]

    def of_images(self, chosen: np.ndarray) -> "Survey":
        """The same of some images, ascending indices; `found` stays that of all."""
        own = np.isin(self.owners, chosen)
        owners = np.searchsorted(chosen, self.owners[own])
        return Survey(self.found, self.images[chosen], self.boxes[own], self.labels[own], owners)

    @property
    def per_image(self) -> np.ndarray:
        """(N,) boxes of each image."""
        return np.bincount(self.owners, minlength=len(self.images))


def take(found: CocoFile) -> Survey:
    """Count what a JSON holds; UserError as `CocoFile.check_boxes`."""
    found.check_boxes()
    single = [entry for entry in found.annotations if not entry["iscrowd"]]
    place = {image["id"]: i for i, image in enumerate(found.images)}
    label = {number: i for i, number in enumerate(found.category_ids)}
    return Survey(
        found,
        np.array([(image["height"], image["width"]) for image in found.images]),
        np.array([entry["bbox"] for entry in single], float),
        np.array([label[entry["category_id"]] for entry in single]),
        np.array([place[entry["image_id"]] for entry in single]),
    )


class InputSize(NamedTuple):
    """To what images are resized: the short side, and the most that the long one may be.

    Attributes:
        shape: "landscape", "portrait" or "mixed". smallest: the class that was looked at, and the
            median side of its boxes at this size.
    """

    short: int
    long: int
    shape: str
    smallest: Tuple[str, float]

    @property
    def canvas(self) -> Tuple[int, int]:
        """Height and width that hold every resized image, multiples of the largest stride."""
        short, long = (-(-x // MAX_STRIDE) * MAX_STRIDE for x in (self.short, self.long))
        return {"landscape": (short, long), "portrait": (long, short)}.get(self.shape, (long, long))

    def scales(self, images: np.ndarray) -> np.ndarray:
        """(N,) by what images (N, 2) are enlarged, as Detectron2's ResizeShortestEdge does."""
        return np.minimum(self.short / images.min(1), self.long / images.max(1))


def input_size(survey: Survey) -> InputSize:
    """Small, for speed, but the median box of the smallest class keeps a side of `OBJECT` pixels.

    Never above the images' own median size, where there is nothing more to be seen.
    """
    medians = [np.median(survey.relative[survey.labels == x]) for x in np.unique(survey.labels)]
    smallest = int(np.argmin(medians))
    own = float(np.median(survey.images.min(1)))
    wanted = min(max(OBJECT / medians[smallest], LEAST), own, MOST)
    short = max(_STEP, int(wanted / _STEP) * _STEP)
    aspect = np.sort(survey.images.max(1) / survey.images.min(1))
    most = min(float(aspect[int(0.99 * (len(aspect) - 1))]), 2.0)  # a panorama shrinks instead
    long = -(-int(np.ceil(short * most)) // _STEP) * _STEP
    high, wide = ((survey.images @ sign > 0).any() for sign in ([1, -1], [-1, 1]))
    shape = "mixed" if high and wide else "portrait" if high else "landscape"
    name = survey.found.class_names[np.unique(survey.labels)[smallest]]
    return InputSize(short, long, shape, (name, float(medians[smallest] * short)))


class Levels(NamedTuple):
    """Strides of a pyramid's outputs, the stages of the backbone it reads, and what is on top."""

    strides: List[int]
    stages: List[str]
    top_block: str

    @property
    def names(self) -> List[str]:
        return [f"p{stride.bit_length() - 1}" for stride in self.strides]


def levels(sides: np.ndarray, two_stage: bool) -> Levels:
    """Three or more: cells fine enough for the smallest tenth, coarse enough for the largest.

    Args:
        sides: (R,) of boxes, in pixels of the input. two_stage: whose heads read no level above
            the backbone's last stage.
    """
    first = 4 if np.percentile(sides, 10) < _STEP else 8
    last = max(4 * first, 2 ** int(np.ceil(np.log2(max(np.percentile(sides, 95) / 8, 1)))))
    above = last > MAX_STRIDE and not two_stage
    last = 128 if above else min(last, MAX_STRIDE)
    strides = [2**i for i in range(2, 8) if first <= 2**i <= last]
    stages = [f"res{stride.bit_length() - 1}" for stride in strides if stride <= MAX_STRIDE]
    return Levels(strides, stages, "p6p7" if above else "none")


def lines(survey: Survey, bad: Sequence[str] = ()) -> List[str]:
    """What was found, for people; ``bad``: reasons why images cannot be used."""
    found, counts, area = survey.found, survey.per_image, survey.boxes[:, 2:].prod(1)
    per_class = np.bincount(survey.labels, minlength=len(found.categories))
    classes = [f"{one_line(x, 40)} {n}" for x, n in zip(found.class_names, per_class)]
    shown = classes[:20] + [f"... {len(classes)} in all"] * (len(classes) > 20)
    small = int((area < SMALL**2).sum())
    ret = [
        f"{found.counted()}",
        f"classes, with boxes: {', '.join(shown)}",
        f"sizes: {_sizes(survey.images)}",
        f"boxes per image: {counts.min()} to {counts.max()}, median {np.median(counts):g}; "
        f"{_without_any(int((counts == 0).sum()))}",
        f"small objects (below {SMALL}x{SMALL} pixels): {small} of {len(area)}, "
        f"{small / len(area):.1%}",
    ]
    faults = [found.dropped_text(), *found.notes, *found.warnings]
    empty = [name for name, n in zip(found.class_names, per_class) if not n]
    if empty:
        faults.append(f"classes without a box: {', '.join(one_line(x, 40) for x in empty)}")
    if bad:
        faults.append(f"{len(bad)} images cannot be used and are left out; the first: {bad[0]}")
    return ret + [f"fault: {one_line(text)}" for text in faults if text]


def _without_any(count: int) -> str:
    return f"{count} images without any, which are not trained on" if count else "none is without"


def _sizes(images: np.ndarray) -> str:
    sizes = Counter((int(w), int(h)) for h, w in images)
    (width, height), count = sizes.most_common(1)[0]
    high = int((images[:, 0] > images[:, 1]).sum())
    more = f", {len(sizes)} sizes in all" if len(sizes) > 1 else ""
    return f"{count} of {len(images)} images are {width}x{height}{more}; {high} are portrait"


def without(found: CocoFile, bad: Sequence[int]) -> CocoFile:
    """The same without some images and their boxes; UserError if nothing is left."""
    gone = {found.images[i]["id"] for i in bad}
    if len(gone) == len(found.images):
        raise UserError(f"dataset JSON {found.path}: none of its {len(gone)} images can be used")
    found.images = [image for image in found.images if image["id"] not in gone]
    found.annotations = [x for x in found.annotations if x["image_id"] not in gone]
    return found
