"""To what size a backbone wants its batches padded, and its maps on another one's grid."""

from typing import Dict, Mapping, NamedTuple, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor

from ..errors import UserError
from .taps import Source, Sources

Size = Tuple[int, int]  # (height, width) in pixels


class Padding(NamedTuple):
    """What a backbone says of it, as Detectron2's main reads it; v0.6 knows steps only.

    Attributes:
        step: both sides are multiples of it. square: both are this long before that; 0 = as long
            as the batch.
    """

    step: int
    square: int

    @classmethod
    def of(cls, backbone: Backbone) -> "Padding":
        said = getattr(backbone, "padding_constraints", {})
        step = said.get("size_divisibility", backbone.size_divisibility)
        # `detectors.vit` has it as an attribute: were it among the constraints, Detectron2 would
        # crop what is larger, without a word
        square = said.get("square_size", 0) or getattr(backbone, "square_size", 0)
        return cls(max(step, 1), max(square, 0))  # 0 is "none" for both

    def size(self, batch: Size) -> Size:
        """Of a batch whose images reach to ``batch``."""
        height, width = (self.square or side for side in batch)
        return -(-height // self.step) * self.step, -(-width // self.step) * self.step

    def teaching(self, padded: Size) -> Size:
        """To what a teacher pads a batch that the student pads to ``padded``.

        Raises:
            UserError: that is larger than the square, where Detectron2 would crop it and say
                nothing.
        """
        own = self.size(padded) if self.square else padded
        if padded[0] > own[0] or padded[1] > own[1]:
            raise UserError(
                f"the teacher pads its images to a square of {own[0]} pixels, and a batch of "
                f"{padded[0]}x{padded[1]} does not fit into it; set INPUT.MAX_SIZE_TRAIN (for test "
                f"images INPUT.MAX_SIZE_TEST) to {own[0]} or less"
            )
        return own


def check_padding(cfg: CfgNode, student: Backbone, teacher: Backbone) -> None:
    """Raise UserError where the teacher cannot take the batches that the student will have."""
    own, theirs = Padding.of(student), Padding.of(teacher)
    if theirs.square:
        longest = cfg.INPUT.MAX_SIZE_TRAIN if any(cfg.INPUT.MIN_SIZE_TRAIN) else 0  # 0: unknown
        side, _ = theirs.size((0, 0))
        if own.square > side:
            raise UserError(
                f"MODEL.VIT.SQUARE {own.square}: the teacher pads its images to a square of {side} "
                f"pixels, and the student's square does not fit into it; set it to {side} or less"
            )
        if own.size((longest, longest))[0] > side:
            raise UserError(
                f"INPUT.MAX_SIZE_TRAIN {longest}: the teacher pads its images to a square of "
                f"{side} pixels, and batches of that size do not fit into it; set it to {side} or "
                "less"
            )
    elif own.step % theirs.step:
        raise UserError(
            f"cannot distil: the student pads its batches to multiples of {own.step} pixels, the "
            f"teacher needs multiples of {theirs.step}; use backbones with equal size_divisibility"
        )


def why_not_one_grid(student: Backbone, teacher: Backbone) -> str:
    """Why a teacher's dense head has other cells than the student's; "" if it has the same."""
    theirs = Padding.of(teacher)
    if not theirs.square or Padding.of(student).size((0, 0)) == theirs.size((0, 0)):
        return ""
    return (
        f"the teacher pads its images to a square of {theirs.square} pixels, so that its head has "
        "other cells than the student's"
    )


def strides(backbone: Backbone, sources: Optional[Sources]) -> Dict[str, int]:
    """Pixels per cell of each level that is read; levels that state none are left out."""
    shapes = backbone.output_shape()
    body = getattr(backbone, "bottom_up", None)
    stages: Mapping[str, ShapeSpec] = body.output_shape() if isinstance(body, Backbone) else {}
    if sources is None:
        sources = {name: Source(name) for name in shapes}
    found = {k: (stages if x.stage else shapes)[x.output].stride for k, x in sources.items()}
    return {level: stride for level, stride in found.items() if stride}


def cut(level: Tensor, own: Size, padded: Size, stride: int = 0) -> Tensor:
    """The cells of a map (N, C, H, W) of ``own`` pixels that lie on the first ``padded`` ones."""
    cells = level.shape[-2:]
    steps = (stride or -(-side // count) for side, count in zip(own, cells))
    height, width = (-(-side // step) for side, step in zip(padded, steps))
    return level[..., :height, :width]
