"""Image files for training and evaluation: the pixels that serving reads, or a named refusal."""

import copy
from typing import Optional

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager

from fgd_inputs.image_files import BadImage, open_image

from .augmentation import CropWhereLarge, NoiseWhereSmall, sample_input


def read_image(path: str, image_format: str) -> np.ndarray:
    """Detectron2's `read_image` for files that it reads right, and those of `deploy.serving`.

    Args:
        image_format: INPUT.FORMAT.
    Returns:
        (H, W, C) uint8, 0..255, upright: EXIF orientation is applied, alpha is dropped, grey is
        repeated, palette and CMYK are converted; of 16-bit colour the high bytes are taken.
    Raises:
        BadImage: see `fgd_inputs.image_files.open_image`; names the file.
    """
    try:
        with PathManager.open(path, "rb") as file, open_image(file, path) as image:
            return detection_utils.convert_PIL_to_numpy(image, image_format)
    except OSError as error:
        raise BadImage(f"cannot read image {path}: {error}") from error


class ImageMapper(DatasetMapper):
    """Detectron2's mapper of detection datasets, with `read_image` in place of its own.

    Args:
        noise: changes the image before all other augmentations, and nothing else of the sample.
        small_area: what INPUT.SAMPLE_SPECIFIC calls small; None for augmentations that do not look
            at objects.
        second: also read "second_file_name", where a sample has it; what ``augmentations`` draw is
            applied to both images alike, so that their pixels correspond.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        noise: Optional[T.Augmentation] = None,
        small_area: Optional[float] = None,
        second: bool = False,
        **options,
    ):
        super().__init__(is_train, **options)
        self.noise, self.small_area, self.second = noise, small_area, second

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True, plain: bool = True) -> dict:
        """``plain``: without INPUT.SAMPLE_SPECIFIC and second images, whatever the config says."""
        options = super().from_config(cfg, is_train)
        node = cfg.INPUT.SAMPLE_SPECIFIC
        options["second"] = not plain
        if node.ENABLED and not plain:
            options["small_area"] = node.SMALL_AREA
            options["noise"] = NoiseWhereSmall(node.NOISE_PROB, node.NOISE_SIGMA)
            options["augmentations"].append(CropWhereLarge(node.CROP))
        return options

    def __call__(self, dataset_dict: dict) -> dict:
        """A dataset dict → the dict that a model takes, with "second_image" if there is one.

        Raises:
            BadImage: as `read_image`; or the size is not the annotation's, or too thin to resize,
                or the second image has another.
        """
        sample = copy.deepcopy(dataset_dict)
        image = read_image(sample["file_name"], self.image_format)
        try:
            detection_utils.check_image_size(sample, image)
            augmented = self._input(sample, image)
            transforms = self.augmentations(augmented)
        except detection_utils.SizeMismatchError as error:
            raise BadImage(str(error)) from error
        except ValueError as error:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise BadImage(f"image {sample['file_name']} of {size}: {error}") from error
        pixels = augmented.image
        sample["image"] = _tensor(pixels)
        second = sample.pop("second_file_name", None)
        if self.second and second is not None:
            own = self._read_second(second, sample["file_name"], image.shape)
            sample["second_image"] = _tensor(transforms.apply_image(own))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                sample, pixels.shape[:2], transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, pixels.shape[:2])
        return sample

    def _input(self, sample: dict, image: np.ndarray) -> T.AugInput:
        if self.small_area is None:
            return T.AugInput(image)
        found = sample_input(image, sample.get("annotations", ()), self.small_area)
        if self.noise is not None:
            self.noise(found)
        return found

    def _read_second(self, path: str, first: str, shape: tuple) -> np.ndarray:
        """The second image, which must have the shape of the first as it is in its file."""
        second = read_image(path, self.image_format)
        if second.shape != shape:
            sizes = [f"{x[1]}x{x[0]}" for x in (second.shape, shape)]
            raise BadImage(
                f"second image {path} is of {sizes[0]} pixels, {first}, which it belongs to, of "
                f"{sizes[1]}"
            )
        return second


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
