"""What every exportable detector shares: pixels in, and from kept rows to the output tensors."""

import copy
import operator
from typing import Dict, Iterable, List, Tuple

import torch
from torch import Tensor, nn

from deploy.errors import UserError
from deploy.graphs.area import Area, follow, inside
from deploy.graphs.linears import write_out_linears
from deploy.graphs.means import write_out_means
from deploy.graphs.ops import INVALID
from deploy.spec import OUTPUT_NAMES
from fgd.distillation.padding import Padding

TIE = 1e-6  # scores closer than this have no order; confident ones saturate at exactly 1
FEATURES = "features."  # prefix of the backbone's outputs among what `network` returns


class ExportableDetector(nn.Module):
    """Tensors in, tensors out, no branches on data: what a .onnx file promises (`spec.ModelSpec`).

    Inputs:  images (B, 3, H, W) float32 or uint8, raw pixels, image at the top left, the padding
             may hold anything; image_sizes (B, 2) int32, the true (height, width).
    Outputs: num_dets (B, 1) int32; boxes (B, K, 4) float32 xyxy in canvas pixels, clipped to the
             true size; scores (B, K) float32 descending; labels (B, K) int32. Rows past num_dets:
             0, 0 and -1. If a pixel of an image or a raw prediction for it is NaN or infinite, all
             its scores are NaN, and an image of NaN gives no detection.
             With `mask_size` M > 0 also masks (B, K, M, M) float32, the probability of each
             detection's class on a grid that spans its box; 0 past num_dets.

    A subclass borrows the sub-modules of a Detectron2 model and follows its inference step by step:
        network(images, image_sizes) -> {name: tensor}, all that has weights, stage by stage:
            `name_features`, raw predictions, and under their own names those outputs that a later
            head needed;
        detect(raw, image_sizes) -> the outputs, all that selects.
    It also sets `levels` (of the dense head), `num_classes`, `nms_threshold` and `max_detections`.

    Args:
        student: the Detectron2 model. It is copied: the caller's stays as it was.
    Raises:
        UserError: the model has a part whose inference this class does not follow.
    """

    # Where the model keeps its score threshold; `score_threshold` is its name in the file.
    threshold_path: str
    # Tensors that `network` itself selected; it takes them as keyword arguments to be given.
    selections: Tuple[str, ...] = ()
    mask_size = 0
    proposals = 0  # per image, of a detector with two stages
    static = False  # to be exported with `static_ops`: nothing but its speed depends on it

    def __init__(self, student: nn.Module):
        super().__init__()
        self.check_kind(student)
        _refuse_deformable(student)
        _refuse_other_square(student)
        self.student = copy.deepcopy(student)
        write_out_means(self.student)
        write_out_linears(self.student.backbone)  # those of heads have rows, not tokens
        self.student.requires_grad_(False)
        threshold = operator.attrgetter(self.threshold_path)(student)
        self.register_buffer("score_threshold", torch.tensor(float(threshold)))
        self.area = Area(self.size_divisibility)
        self.eval()

    @torch.no_grad()
    def follow_images(self) -> None:
        """Have every image seen as if it were alone in its batch and padded by Detectron2.

        To be called once, when the graph is whole. A canvas of one size only is what Detectron2
        pads to itself.
        """
        if self.square:
            self.area.filled = True
            return
        follow(self.area, [self.student.backbone, self.dense_head])
        strides = [shape.stride for shape in self.student.backbone.output_shape().values()]
        side = 2 * max(*strides, self.size_divisibility)
        with self.area.watch(side):
            self.on_maps(torch.zeros(1, 3, side, side), torch.tensor([[side, side]]))

    @property
    def dense_head(self) -> nn.Module:
        """What predicts for every cell of the pyramid."""
        return self.student.head

    def on_maps(self, images: Tensor, image_sizes: Tensor):
        """The first part of `network`: features by level, and what `dense_head` predicts."""
        with self.area.of(image_sizes):
            features = self.student.backbone(self.normalize(images, image_sizes))
            return features, self.dense_head([features[level] for level in self.levels])

    @staticmethod
    def check_kind(student: nn.Module) -> None:
        """UserError if the model has a part whose inference the subclass does not follow."""

    @property
    def size_divisibility(self) -> int:
        """The sides of the canvas must be multiples of it."""
        return max(self.student.backbone.size_divisibility, 1)

    @property
    def square(self) -> int:
        """Both sides of the one canvas that there is; 0 = there are others."""
        return Padding.of(self.student.backbone).square

    def forward(self, images: Tensor, image_sizes: Tensor):
        """Outputs of the class docstring, then the other tensors of `network` in its order."""
        raw = self.network(images, image_sizes)
        inner = {name: value for name, value in raw.items() if name not in OUTPUT_NAMES}
        counts, boxes, scores, *others = self.detect(raw, image_sizes)
        # a sum is NaN or infinite when one of its terms is, and reads each value only once;
        # what is wrong with features shows in the predictions from them
        judged = [value for name, value in inner.items() if not name.startswith(FEATURES)]
        judged = [self.normalize(images, image_sizes), *judged]
        sums = [values.reshape(images.shape[0], -1).sum(dim=1) for values in judged]
        good = torch.isfinite(torch.stack(sums, dim=1)).all(dim=1, keepdim=True)
        if self.area.filled:
            canvas = torch.tensor(images.shape[-2:], dtype=image_sizes.dtype)
            good = good & (image_sizes > canvas - self.area.step).all(dim=1, keepdim=True)
        return (counts, boxes, torch.where(good, scores, torch.nan), *others, *inner.values())

    def cut_scores(self, raw: Dict[str, Tensor], image_sizes: Tensor) -> List[List[float]]:
        """Per image the scores at which candidates were cut although the next one's is as high.

        Which of them go on is then a matter of the order of equal scores, as in an image on which
        a thousand confident ones saturate at exactly 1.
        """
        return [[] for _ in image_sizes]

    def cut_images(self, raw: Dict[str, Tensor], num_dets: Tensor) -> int:
        """In how many images a fixed limit inside the graph may have cut off detections."""
        return 0

    def only_inside(self, logits: Tensor, stride: int, image_sizes: Tensor) -> Tensor:
        """Logits (B, A, H, W) of a map, `INVALID` in cells which an image alone would not have."""
        if self.area.filled:
            return logits
        of_image = inside(image_sizes, self.area.step, stride, *logits.shape[-2:])
        return torch.where(of_image[:, None], logits, INVALID)

    def normalize(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """(pixels - mean) / std, and exactly 0 outside the true size, where Detectron2 pads."""
        mean, std = self.student.pixel_mean, self.student.pixel_std
        of_image = inside(image_sizes, 1, 1, *images.shape[-2:])[:, None]
        return torch.where(of_image, (images.to(mean.dtype) - mean) / std, 0.0)


def _refuse_deformable(student: nn.Module) -> None:
    for name, part in student.named_modules():
        if type(part).__module__ == "detectron2.layers.deform_conv":
            raise UserError(
                f"MODEL.RESNETS.DEFORM_ON_PER_STAGE: {name} is a {type(part).__name__}, which "
                "cannot be exported"
            )


def _refuse_other_square(student: nn.Module) -> None:
    """A square that Detectron2 alone pads to: on another canvas there are other features."""
    backbone = student.backbone
    square, step = Padding.of(backbone).square, backbone.size_divisibility
    if square and step != square:
        raise UserError(
            f"MODEL.BACKBONE.NAME: {type(backbone).__name__} pads images to a square of {square} "
            f"pixels and states a size_divisibility of {step}, so a graph of it would find others; "
            "only build_vit_fpn_backbone and build_retinanet_vit_fpn_backbone can be exported"
        )


def name_features(features: Dict[str, Tensor], levels: Iterable[str]) -> Dict[str, Tensor]:
    """The backbone's outputs that a detector reads, named as `network` returns them."""
    return {f"{FEATURES}{level}": features[level] for level in sorted(levels)}


def require(part, kind: type, where: str) -> None:
    """UserError unless `part` is a `kind` and no subclass, whose inference may differ."""
    if type(part) is not kind:
        raise UserError(
            f"{where}: {type(part).__name__} cannot be exported, only {kind.__name__} can"
        )


def dense(prediction: Tensor, dims: int) -> Tensor:
    """(B, A * dims, H, W) of a dense head -> (B, H * W * A, dims), Detectron2's anchor order."""
    batch, _, height, width = prediction.shape
    split = prediction.reshape(batch, -1, dims, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(batch, -1, dims)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, N, D), index (B, k) -> (B, k, D)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def anchors_at(
    index: Tensor, width: int, cell_anchors: Tensor, stride: int, offset: float
) -> Tensor:
    """Anchors number `index` of a level, computed instead of stored.

    Args:
        index: (B, k) int64, counted over rows, columns, then cell anchors.
        width: cells per row (may be symbolic).  cell_anchors: (A, 4) pixels around 0.
        stride: pixels per cell.  offset: of the first centre, in cells.
    Returns:
        (B, k, 4) xyxy, equal to Detectron2's `DefaultAnchorGenerator` to the last bit.
    """
    count = cell_anchors.shape[0]
    cell = index // count
    row = cell // width
    center = torch.stack((cell - row * width, row), dim=-1).to(cell_anchors.dtype)
    center = center * stride + offset * stride
    base = nn.functional.embedding(index - cell * count, cell_anchors)
    return torch.cat((center, center), dim=-1) + base


def decode(deltas: Tensor, boxes: Tensor, transform) -> Tensor:
    """Detectron2's `Box2BoxTransform.apply_deltas` for deltas and boxes (..., 4)."""
    size = boxes[..., 2:] - boxes[..., :2]
    center = boxes[..., :2] + 0.5 * size
    weights = deltas.new_tensor(transform.weights)
    deltas = deltas / weights
    center = deltas[..., :2] * size + center
    size = torch.exp(deltas[..., 2:].clamp(max=transform.scale_clamp)) * size
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes (B, N, 4) limited to 0..width and 0..height of their image."""
    limit = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def nonempty(boxes: Tensor, threshold: float = 0.0) -> Tensor:
    """(B, N) bool: both sides longer than `threshold`; False for NaN."""
    return ((boxes[..., 2:] - boxes[..., :2]) > threshold).all(dim=-1)


def finish(
    index: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor, image_sizes: Tensor
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs from the kept rows: clip, drop empty boxes (after NMS, as Detectron2 does).

    Args:
        index: (B, K) rows that NMS kept, -1 where none.
        boxes: (B, N, 4).  scores: (B, N).  labels: (B, N) int64.
    Returns:
        num_dets, boxes, scores, labels of `ExportableDetector`.
    """
    row = index.clamp(min=0)
    boxes = clip(take(boxes, row), image_sizes)
    valid = (index >= 0) & nonempty(boxes)
    scores = torch.where(valid, scores.gather(1, row), INVALID)
    scores, order = scores.topk(index.shape[1])  # dropped rows go last
    valid = valid.gather(1, order)
    labels = labels.gather(1, row).gather(1, order)
    return (
        valid.sum(dim=1, keepdim=True, dtype=torch.int32),
        torch.where(valid[..., None], take(boxes, order), 0.0),
        torch.where(valid, scores, 0.0),
        torch.where(valid, labels, -1).to(torch.int32),
    )
