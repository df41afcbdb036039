"""The images of a start: read, looked at, and divided into training, validation and test."""

import os
from typing import Dict, List, NamedTuple, Tuple

import numpy as np

from fgd_inputs.coco import CocoFile, read_coco, read_test_set
from fgd_inputs.coco_masks import BITMASK, POLYGON
from fgd_inputs.file_names import image_folder
from fgd_inputs.names import one_line

from ..errors import UserError
from .split import Looks, groups, look, lost_classes, part_json, split
from .survey import Survey, take, without

PARTS = ("valid", "test")


class Source(NamedTuple):
    """A JSON and the folder of its images, absolute."""

    path: str
    folder: str

    @classmethod
    def of(cls, path: str, images: str) -> "Source":
        path = os.path.abspath(os.path.expanduser(path))
        return cls(path, image_folder(path, images))


class Sets(NamedTuple):
    """What is trained on, chosen by and tested on.

    Attributes:
        survey: of all usable images of --train. parts: "train" and what was set apart of it, as
            indices of its images. given: the other sets. grey: (N,) mean grey of its images.
        bad: reasons why images are left out. near: training images that a given set has too, or
            nearly. mask_format: of INPUT; "" without masks.
    """

    source: Source
    survey: Survey
    parts: Dict[str, np.ndarray]
    given: Dict[str, Tuple[Source, CocoFile]]
    grey: np.ndarray
    bad: List[str]
    near: int
    mask_format: str

    @property
    def training(self) -> Survey:
        """Of the images that are trained on, which alone decide what the configs say."""
        return self.survey.of_images(self.parts["train"])

    def files(self) -> Dict[str, bytes]:
        """Names and contents of the JSONs to be written."""
        own = self.survey.found, self.source.folder
        return {f"{x}.json": part_json(own[0], at, own[1], x) for x, at in self.parts.items()}

    def keys(self, folder: str) -> Dict[str, str]:
        """DATASETS.JSON, with what is written in ``folder``."""
        ret = {}
        for part in ("train", *PARTS):
            path, images = os.path.join(folder, f"{part}.json"), self.source.folder
            if part in self.given:
                path, images = self.given[part][0]
            ret |= {part.upper(): path, f"{part.upper()}_IMAGES": images}
        return ret

    def photo(self) -> str:
        """An image of the test set that can be typed, or the folder of them."""
        if "test" in self.given:
            source, images = self.given["test"][0], self.given["test"][1].images
        else:
            source, images = self.source, self.survey.found.images
            images = [images[i] for i in self.parts["test"]]
        files = (image["file"] for image in images)
        return next((file for file in files if file.isprintable()), source.folder)

    def lines(self) -> List[str]:
        """Sizes of the parts, and what is wrong with them."""
        ret = [
            f"{part}: {len(own)} images of {one_line(self.source.path)}"
            for part, own in self.parts.items()
        ]
        ret += [
            f"{part}: {len(own.images)} images of {one_line(source.path)}"
            for part, (source, own) in self.given.items()
        ]
        if len(self.parts) > 1:
            ret[0] += "; near duplicates are in one part"
        if self.near:
            ret.append(
                f"fault: {self.near} training images are near duplicates of images of "
                f"{' or '.join(self.given)}, so AP says little of other images"
            )
        for part, names in lost_classes(self.survey, self.parts):
            shown = ", ".join(one_line(x, 40) for x in names[:10])
            ret.append(f"fault: no box in {part} of {len(names)} classes: {shown}")
        return ret


def read_sets(source: Source, others: Dict[str, Source], masks: bool) -> Sets:
    """Read, look at and divide; validation and test images are set apart where none are given.

    Raises:
        UserError: as `read_coco` and `split`; or an image of a given set cannot be used.
    """
    found, mask_format = _read_training_set(source, masks)
    hint = "name the folder with --{}-images"
    given = {
        part: (own, read_test_set(*own, masks=masks, hint=hint.format(part)))
        for part, own in others.items()
    }
    looks = look([*found.images, *(x for _, own in given.values() for x in own.images)])
    count = len(found.images)
    bad = [i for i in looks.bad if i < count]
    if len(bad) < len(looks.bad):
        reason = next(x for i, x in looks.bad.items() if i >= count)
        raise UserError(f"an image to be evaluated cannot be used: {reason}")
    group, near = _movable(looks, count)
    keep = np.setdiff1d(np.arange(count), bad)
    survey = take(without(found, bad))
    parts = split(survey, group[keep], [part for part in PARTS if part not in given])
    reasons, near = [looks.bad[i] for i in bad], int(near[keep].sum())
    return Sets(source, survey, parts, given, looks.grey[keep], reasons, near, mask_format)


def _read_training_set(source: Source, masks: bool) -> Tuple[CocoFile, str]:
    hint = "name the folder of the images with --images"
    if not masks:
        return read_coco(*source, hint=hint), ""
    try:
        return read_coco(*source, masks=POLYGON, hint=hint), POLYGON
    except UserError:
        pass
    try:  # which takes RLE too, or says what is wrong
        return read_coco(*source, masks=BITMASK, hint=hint), BITMASK
    except UserError as error:
        raise UserError(f"--detector mask_rcnn: {error}") from error


def _movable(looks: Looks, count: int) -> Tuple[np.ndarray, np.ndarray]:
    """The group of each of the first ``count`` images, -1 where it has an image of the others."""
    group = groups(looks)
    near = np.isin(group[:count], group[count:])
    return np.where(near, -1, group[:count]), near
