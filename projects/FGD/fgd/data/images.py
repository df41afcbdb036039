"""Image files for training and evaluation: the pixels that serving reads, or a named refusal."""

import copy

import numpy as np
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from ..errors import UserError

MAX_PIXELS = 89_478_485  # where Pillow warns of a bomb: 32 kB can claim 268 Mpx
# Modes whose conversion to RGB keeps 8 bits per channel as they are. The others ("I;16", "I", "F",
# "LAB") would be clipped to white or misread without a word.
EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


class BadImage(UserError):
    """An image file that cannot be used: which, and why."""


def read_image(path: str, image_format: str) -> np.ndarray:
    """Detectron2's `read_image` for files that it reads right, and those of `deploy.serving`.

    Args:
        image_format: INPUT.FORMAT.
    Returns:
        (H, W, C) uint8, 0..255, upright: EXIF orientation is applied, alpha is dropped, grey is
        repeated, palette and CMYK are converted; of 16-bit colour the high bytes are taken.
    Raises:
        BadImage: missing, damaged, above `MAX_PIXELS`, or not 8 bits per channel, which Detectron2
            clips at 255; names the file.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"image {path}: {width}x{height} is more than {MAX_PIXELS} pixels")
            if image.mode not in EIGHT_BIT_MODES:
                raise BadImage(
                    f"image {path}: mode {image.mode!r} is not 8 bits per channel; convert it first"
                )
            return detection_utils.convert_PIL_to_numpy(_upright(image), image_format)
    except BadImage:
        raise
    except Exception as error:  # decoders meet damaged bytes with any exception type
        raise BadImage(f"cannot read image {path}: {error or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        # Loads first: loading turns a TIFF, and Detectron2, which looks before, turns it twice.
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block; Detectron2 ignores it as well (its issue 1885)
        return image


class ImageMapper(DatasetMapper):
    """Detectron2's mapper of detection datasets, with `read_image` in place of its own."""

    def __call__(self, dataset_dict: dict) -> dict:
        """A dataset dict → the dict that a model takes.

        Raises:
            BadImage: as `read_image`; or the size is not the annotation's, or too thin to resize.
        """
        sample = copy.deepcopy(dataset_dict)
        image = read_image(sample["file_name"], self.image_format)
        try:
            detection_utils.check_image_size(sample, image)
            augmented = T.AugInput(image)
            transforms = self.augmentations(augmented)
        except detection_utils.SizeMismatchError as error:
            raise BadImage(str(error)) from error
        except ValueError as error:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise BadImage(f"image {sample['file_name']} of {size}: {error}") from error
        pixels = augmented.image
        sample["image"] = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                sample, pixels.shape[:2], transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, pixels.shape[:2])
        return sample
