"""Every image of a padded batch seen as if it were alone: outside of it there is nothing.

Detectron2 pads an image to a multiple of the backbone's stride, a graph to a whole canvas. There
biases soon make values of the padding, which convolutions carry into the image, and averages over
the map take them in everywhere. So whatever reads neighbouring cells finds zeros outside of an
image, as it would at the end of a map, and averages are taken over each image's own cells: the same
numbers on any canvas.
"""

from contextlib import contextmanager
from typing import Dict, Iterable, List, Optional, Tuple

import torch
from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor, nn

from deploy.graphs.means import Mean


class Area:
    """Where the images of the batch at hand end, for the layers that follow it.

    An image's area is its size rounded up to `step`. Layers do not know at which stride they are
    called, and shapes may be symbols. So `watch` notes the strides of all calls once, and each
    forward pass makes the same calls in the same order.
    """

    def __init__(self, step: int):
        self.step = step
        self.filled = False  # every image fills the canvas, so that there is nothing to mask
        self.layers: List[_Layer] = []
        self._side = 0  # of the images that are watched; 0 when strides are known
        self._sizes = None
        self._masks: Dict[Tuple[int, torch.dtype], Tensor] = {}

    @contextmanager
    def watch(self, side: int):
        """Around one pass over images of side x side, a multiple of every stride."""
        self._side = side
        try:
            yield
        finally:
            self._side = 0

    @contextmanager
    def of(self, image_sizes: Tensor):
        """Around every pass over the maps of images of these sizes, (B, 2) height and width."""
        self._sizes = image_sizes
        for layer in self.layers:
            layer.calls = 0
        try:
            yield
        finally:
            self._sizes = None
            self._masks.clear()

    def mask(self, layer: "_Layer", x: Tensor) -> Tensor:
        """(B, 1, H, W) in the precision of x: 1 on the image's cells, 0 outside."""
        if self._side:
            layer.strides.append(self._side // x.shape[-2])
        stride = layer.strides[layer.calls]
        layer.calls += 1
        key = stride, x.dtype
        if key not in self._masks:
            mask = inside(self._sizes, self.step, stride, *x.shape[-2:])
            self._masks[key] = mask[:, None].to(x.dtype)
        return self._masks[key]


class _Layer:
    """One layer that follows an area, as a hook of it."""

    def __init__(self, area: Area):
        self.area, self.strides, self.calls = area, [], 0
        area.layers.append(self)

    def masked(self, x: Tensor) -> Tensor:
        return x if self.area.filled else x * self.area.mask(self, x)


class _MaskInput(_Layer):
    def __call__(self, layer, args):
        return (self.masked(args[0]), *args[1:])


class _MaskOutput(_Layer):
    def __call__(self, layer, args, output):
        return self.masked(output)


class _LowestInput(_Layer):
    """What the largest of several cells must not be."""

    def __call__(self, layer, args):
        if self.area.filled:
            return None
        inside = self.area.mask(self, args[0]) > 0
        return (torch.where(inside, args[0], torch.finfo(args[0].dtype).min), *args[1:])


class _Share(_Layer):
    """What each cell counts in an average over the map: 0 outside, the same inside, 1 on average.

    (B, C, H, W) -> (B, 1, H, W) float32, or float64 as the map; None: all alike.
    """

    def __call__(self, x: Tensor) -> Optional[Tensor]:
        if self.area.filled:
            return None
        mask = self.area.mask(self, x).to(torch.promote_types(x.dtype, torch.float32))
        return mask / mask.mean(dim=(2, 3), keepdim=True)


def follow(area: Area, parts: Iterable[nn.Module]) -> None:
    """Make all layers inside `parts` follow the area."""
    for layer in nn.ModuleList(parts).modules():
        if isinstance(layer, Mean):
            layer.share = _Share(area)
        elif isinstance(layer, nn.MaxPool2d):
            layer.register_forward_pre_hook(_LowestInput(area))
            layer.register_forward_hook(_MaskOutput(area))
        elif isinstance(layer, BasicStem):  # a ReLU and a pooling function follow
            layer.conv1.register_forward_hook(_MaskOutput(area))
        elif _reads_neighbours(layer):
            layer.register_forward_pre_hook(_MaskInput(area))


def _reads_neighbours(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Conv2d, nn.AvgPool2d)):
        sides = layer.kernel_size
        return max(sides if isinstance(sides, tuple) else (sides,)) > 1
    return getattr(layer, "reads_neighbours", False)


def inside(image_sizes: Tensor, step: int, stride: int, height: int, width: int) -> Tensor:
    """(B, H, W) bool: cells of maps of this stride that belong to the image.

    Args:
        image_sizes: (B, 2) true height and width, in pixels.  step: they are rounded up to it.
    """
    rows, columns = _inside(image_sizes, step, stride, height, width)
    return rows[:, :, None] & columns[:, None, :]


def _inside(image_sizes: Tensor, step: int, stride: int, *cells: int) -> List[Tensor]:
    """(B, H) of rows and (B, W) of columns."""
    sides = []
    for side, count in enumerate(cells):
        first = torch.arange(count, device=image_sizes.device) * stride  # pixel of each cell
        # first < size rounded up to step, without rounding what only the graph's user knows
        sides.append((first // step * step)[None] < image_sizes[:, side : side + 1])
    return sides


def extend(x: Tensor, image_sizes: Tensor, step: int, stride: int) -> Tensor:
    """Maps (B, C, H, W) with each image's last row and column once more after themselves.

    For RoIAlign, which reads up to half a cell beyond: at the end of a map it takes the last cell.
    """
    for dim, within in enumerate(_inside(image_sizes, step, stride, *x.shape[-2:]), 2):
        first = within.roll(1, 1) & ~within  # cell 0 is always inside, so what wraps around is not
        first = first.unflatten(1, (1, -1, 1) if dim == 2 else (1, 1, -1))
        x = torch.where(first, x.roll(1, dim), x)
    return x
