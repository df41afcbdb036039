"""What is measured: random pyramids and batches of images, with boxes of realistic sizes."""

import math
from typing import AbstractSet, Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn.functional import interpolate

from ..methods.batch import Level

# Strides of the levels that FGD distils.
PYRAMIDS = {"retinanet": (8, 16, 32, 64, 128), "rcnn": (4, 8, 16, 32)}
_SMALLEST_SIDE = 12  # pixels


class Maps(NamedTuple):
    """Level → (N, C, H, W); the student's are leaves that take a gradient."""

    student: Dict[str, Tensor]
    teacher: Dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """U: the student's maps over all levels."""
        return sum(x.numel() * x.element_size() for x in self.student.values())


def levels_of(pyramid: str, channels: int) -> List[Level]:
    """Names p2, p3, ... by stride, with equal channels on both sides."""
    return [Level(f"p{int(math.log2(s))}", channels, channels) for s in PYRAMIDS[pyramid]]


def draw_maps(
    pyramid: str, size: Tuple[int, int], batch: int, channels: int, dtype, device: torch.device
) -> Maps:
    """Standard normal maps of a padded batch of ``size`` (height, width) pixels, fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Dict[str, Tensor]:
        maps = {}
        for level, stride in zip(levels_of(pyramid, channels), PYRAMIDS[pyramid]):
            shape = batch, channels, *(-(-pixels // stride) for pixels in size)
            maps[level.name] = torch.randn(shape, generator=generator).to(device, dtype)
        return maps

    maps = Maps(draw(), draw())
    for tensor in maps.student.values():
        tensor.requires_grad_()
    return maps


def draw_boxes(count: int, size: Tuple[int, int], batch: int, seed: int = 0) -> List[Tensor]:
    """``batch`` tensors (count, 4), float32 XYXY inside images of ``size`` (height, width) pixels.

    The root of the area is uniform in its logarithm from 12 pixels to 0.8 times the image's short
    side, so that small objects are the most; the aspect ratio too, from 1:2 to 2:1.
    """
    generator = torch.Generator().manual_seed(seed)

    def one_image() -> Tensor:
        draw = torch.rand(count, 4, generator=generator)
        largest = max(0.8 * min(size), _SMALLEST_SIDE)
        side = _SMALLEST_SIDE * (largest / _SMALLEST_SIDE) ** draw[:, 0]
        aspect = 2 ** (2 * draw[:, 1] - 1)
        width = (side * aspect.sqrt()).clamp(max=size[1])
        height = (side / aspect.sqrt()).clamp(max=size[0])
        left, top = draw[:, 2] * (size[1] - width), draw[:, 3] * (size[0] - height)
        return torch.stack([left, top, left + width, top + height], dim=1)

    return [one_image() for _ in range(batch)]


def _draw_images(size: Tuple[int, int], batch: int, generator: torch.Generator) -> Tensor:
    """Smooth random images (N, 3, H, W), uint8."""
    coarse = torch.rand(batch, 3, 12, 16, generator=generator)
    images = interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return (images * 255).clamp(0, 255).to(torch.uint8)


# Need of a method → what a mapper gives it beside the image: key in the batch's dicts, and how to
# draw one for each image.
EXTRAS: Dict[str, Tuple[str, Callable[[Tuple[int, int], int, torch.Generator], Sequence]]] = {
    "second_view": ("second_image", _draw_images),
}


def draw_batch(
    size: Tuple[int, int],
    batch: int,
    boxes: int,
    classes: int,
    needs: AbstractSet[str] = frozenset(),
) -> List[dict]:
    """Random images (3, H, W) with ``boxes`` boxes each, as a mapper gives them.

    Args:
        needs: of the methods; those in `EXTRAS` add an entry.
    """
    generator = torch.Generator().manual_seed(0)
    images = _draw_images(size, batch, generator)
    inputs = []
    for image, image_boxes in zip(images, draw_boxes(boxes, size, batch), strict=True):
        instances = Instances(size)
        instances.gt_boxes = Boxes(image_boxes)
        instances.gt_classes = torch.randint(classes, (boxes,), generator=generator)
        inputs.append({"image": image, "instances": instances, "height": size[0], "width": size[1]})
    for need in sorted(needs & EXTRAS.keys()):
        key, draw = EXTRAS[need]
        for sample, extra in zip(inputs, draw(size, batch, generator), strict=True):
            sample[key] = extra
    return inputs
