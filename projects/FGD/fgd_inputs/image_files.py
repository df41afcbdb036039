"""Image files: which are read, and how their pixels become 8 bits per channel, upright."""

from contextlib import contextmanager
from typing import IO, Iterator, Union

from PIL import Image, ImageOps

from .errors import UserError

# What Pillow may decode, each by a library inside it. Others are not tried: EPS, for one, would
# start an external program, whatever the file is called.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # where Pillow warns of a bomb: 32 kB can claim 268 Mpx
# Modes whose conversion to RGB keeps 8 bits per channel as they are. The others ("I;16", "I", "F",
# "LAB") would be clipped to white or misread without a word.
EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


class BadImage(UserError):
    """An image file that cannot be used: which, and why."""


@contextmanager
def open_image(
    source: Union[str, IO[bytes]], name: str, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """The decoded first frame of a file, upright, in one of `EIGHT_BIT_MODES`.

    EXIF orientation is applied; a damaged EXIF block counts for nothing, as in Detectron2.

    Args:
        source: a path, or a file open for reading. name: for messages.
        max_pixels: larger images are refused before they are decoded.
    Raises:
        BadImage: missing, damaged, of another format, too large, or not 8 bits per channel.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            yield upright(image, name, max_pixels)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:  # twice Pillow's own limit
        raise BadImage(f"image {name} exceeds {max_pixels} pixels: {error}") from error
    except Exception as error:  # decoders meet damaged bytes with any exception type
        raise BadImage(f"cannot read image {name}: {error or type(error).__name__}") from error


def upright(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A PIL image decoded and turned as its EXIF says; BadImage as `open_image`."""
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"image {name}: {width}x{height} is more than {max_pixels} pixels")
    if image.mode not in EIGHT_BIT_MODES:
        raise BadImage(
            f"image {name}: mode {image.mode!r} is not 8 bits per channel; convert it first"
        )
    image.load()  # a damaged picture must not pass for one with a damaged EXIF block
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Detectron2 ignores it as well (its issue 1885)
        return image
