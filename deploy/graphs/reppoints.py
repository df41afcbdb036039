"""RepPoints as a graph."""

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.graphs.common import clip, require
from deploy.graphs.retinanet import ExportableRetinaNet
from fgd.detectors.reppoints.head import DeformConv, RepPointsHead
from fgd.detectors.reppoints.points import POINTS, MomentTransform

KERNEL = 3  # taps per side of a deformable convolution


class ExportableRepPoints(ExportableRetinaNet):
    """This project's `RepPoints`: as RetinaNet, but boxes are decoded from points around a location
    and clipped before NMS, and deformable convolutions consist of standard operators."""

    predictions = ("logits", "first", "deltas")
    delta_dims = 2 * POINTS

    def __init__(self, student):
        super().__init__(student)
        head = self.student.head
        head.cls_dcn, head.refine_dcn = SampledConv(head.cls_dcn), SampledConv(head.refine_dcn)
        self.student.box2box_transform = FixedTransform(self.student.box2box_transform)

    @staticmethod
    def check_kind(student):
        require(student.head, RepPointsHead, "the RepPoints head")
        require(student.anchor_generator, DefaultAnchorGenerator, "the RepPoints locations")
        require(student.box2box_transform, MomentTransform, "the RepPoints box transform")

    def _decode(self, deltas: Tensor, anchors: Tensor, image_sizes: Tensor) -> Tensor:
        return clip(self.student.box2box_transform.apply_deltas(deltas, anchors), image_sizes)


class FixedTransform(MomentTransform):
    """`MomentTransform` with its factors as what is stored, so that the file names them."""

    def __init__(self, trained: MomentTransform):
        super().__init__()
        del self.moment
        self.register_buffer("exp_moment", trained.factors().detach())

    def factors(self) -> Tensor:
        return self.exp_moment


class SampledConv(nn.Module):
    """`DeformConv` as a bilinear sampling and a plain convolution: GridSample (for TensorRT Gather,
    see `static_ops`) and Conv.

    The nine values that a cell's taps read are put side by side in a map of three times the size,
    which a 3x3 convolution of stride 3 then reads. ONNX has DeformConv only since operator set 19,
    ONNX Runtime and TensorRT since later still and not in float16 or int8; these two have all.
    """

    reads_neighbours = True  # outside of an image they are 0

    def __init__(self, layer: DeformConv):
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x (B, C, H, W), offsets (B, 18, H, W) of `DeformConv` -> (B, C out, H, W) as x.

        Positions and sampled values are in the offsets' precision, the convolution in that of x.
        """
        grid = sampling_grid(offsets)
        values = F.grid_sample(x.to(grid.dtype), grid, padding_mode="zeros", align_corners=False)
        return F.conv2d(values.to(x.dtype), self.weight, stride=KERNEL)


def sampling_grid(offsets: Tensor) -> Tensor:
    """Where the taps read: (B, 18, H, W) in cells -> (B, 3 H, 3 W, 2) xy, where the outer edges of
    the map are -1 and 1."""
    batch, _, height, width = offsets.shape
    offsets = offsets.reshape(batch, KERNEL, KERNEL, 2, height, width)
    offsets = offsets.permute(0, 4, 1, 5, 2, 3)  # cells and taps of rows, then of columns; (y, x)
    rows, columns = (
        torch.arange(size, device=offsets.device)[:, None]
        + torch.arange(-(KERNEL // 2), KERNEL // 2 + 1, device=offsets.device)
        for size in (height, width)
    )
    y = offsets[..., 0] + rows[:, :, None, None]
    x = offsets[..., 1] + columns
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return grid.reshape(batch, KERNEL * height, KERNEL * width, 2)
