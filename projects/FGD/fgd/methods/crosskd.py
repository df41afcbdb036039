"""Cross-Head Knowledge Distillation (CrossKD, CVPR 2024, arXiv 2306.11369), for dense heads.

The student's maps from inside its head run through the rest of the teacher's frozen head, and the
predictions that come out, the crossed ones, follow the teacher's. The student's own predictions
see the ground truth alone, so that the two never pull at the same output. Its convolutions behind
the place of crossing get no gradient from here.

On a level, for each tower: h = `aligned` student's map after convolution i, then ReLU (not for
i = 0, the level itself), then the teacher's convolutions i+1.. and predictors give logits z and
boxes b; t and c are the teacher's on its own maps. With q = sigmoid(t), A the average factor,
ε = 2^-23 and sums over the anchors that are not ignored,

    L_class = 1/(A + ε) · sum of |sigmoid(z) - q|^β · BCE(z, q) over classes and anchors
    L_box = 1/(A + ε) · sum over anchors of (max over classes of q) · distance(b, c)

with distance 1 - GIoU for RetinaNet and -ln IoU for FCOS. Both have no gradient where crossed and
teacher's predictions are equal. FCOS' centerness is not mimicked, as in the authors' code. That
also has GFL and ATSS, whose heads Detectron2 does not have.

Where the authors' code, the paper's words and this file differ:
- After which step maps are taken: the code asks for those before ReLU, but its ReLU works in place,
  so those after it are what it hands over and aligns; that is the default here, BEFORE_ACTIVATION
  the other.
- A: the authors' RetinaNet counts the images of each process; here the mean over processes is
  taken, as theirs is for the other heads, so that no image weighs more for the process it is in.
- A of FCOS is at least 1, theirs 1e-6: a batch without objects would weigh a million times.
- Boxes are decoded as Detectron2's heads do: FCOS' distances are in strides and rectified, the
  authors' are exponentials in pixels; both clamp large sizes, only theirs small ones too.
- A level of one position in the whole batch has no standard deviation. It counts as 0: aligned, the
  student's map is the teacher's, and nothing is taught there.

Published, COCO box AP: RetinaNet R-50 37.4 → 39.7, FCOS R-50 38.5 → 41.1 (teachers R-101); with PKD
on the pyramid beside it 39.8 and 41.3. Both pass their teachers.

Beside the step it costs the teacher's head, and that from convolution i on a second time, forward
and backward. Until the backward pass it holds what these layers need and one tensor of the crossed
logits' size, 2.8 times the maps with 9 anchors of 80 classes: their gradient. Less is not possible,
for it depends on both predictions, each as large.
"""

from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .batch import Batch, Cut, Heads, Level
from .gradients import held, with_gradient
from .method import METHOD_REGISTRY, Method, Table
from .parts import small_dtype

EPSILON = 2.0**-23  # beside the average factor
SMALLEST = 1e-6  # of areas and overlaps that are divided by, or whose logarithm is taken


class Moments(NamedTuple):
    """Standard deviation and mean of each channel of a map, (1, C, 1, 1)."""

    spread: Tensor
    mean: Tensor


def moments(maps: Tensor) -> Moments:
    """Over all images and cells of (N, C, H, W); the deviation with one less than their number.

    Of a single position the deviation is 0. In float32, or float64 if the map is.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    correction = int(maps.numel() > maps.shape[1])
    return Moments(*torch.std_mean(maps, dim=(0, 2, 3), keepdim=True, correction=correction))


def aligned(student: Tensor, teacher: Moments) -> Tensor:
    """The student's map with the mean and standard deviation of the teacher's, by channel.

    h' = (h - mean h) / (std h + 1e-6) · std g + mean g. A constant channel becomes the teacher's
    mean without gradient, and so does all of a map of one position.

    Args:
        student: (N, C, H, W), receives gradient. teacher: of its map g.
    """
    own = moments(student)
    return (student.to(own.mean.dtype) - own.mean) / (own.spread + 1e-6) * teacher[0] + teacher[1]


def class_sum(crossed: Tensor, scores: Tensor, weights: Tensor, beta: float = 1.0) -> Tensor:
    """Sum of w |sigmoid(z) - q|^β · BCE(z, q), scalar >= 0.

    Value and gradient are made together, with
    dL/dz = w (β |d|^(β-1) sign(d) p (1 - p) · BCE + |d|^β d), p = sigmoid(z), d = p - q.

    Args:
        crossed: (N, A, K, H, W) logits z; receive gradient, also through the factor.
        scores: the same shape, q in [0, 1]. weights: (N, A, H, W), w.
        beta: 0 or at least 1; between them equal scores have no gradient.
    """
    return with_gradient(crossed, *_class_sum(crossed, scores, weights[:, :, None], beta))


@torch.no_grad()
def _class_sum(crossed: Tensor, scores: Tensor, weights: Tensor, beta: float) -> tuple:
    crossed = crossed.to(scores.dtype)
    entropy = F.binary_cross_entropy_with_logits(crossed, scores, reduction="none").mul_(weights)
    p = crossed.sigmoid()
    d = p - scores
    distance = d.abs()
    gradient = d.sign().mul_(p).mul_(1 - p).mul_(entropy)
    if beta != 1:
        gradient.mul_(beta * distance.pow(beta - 1) if beta else 0.0)
        distance.pow_(beta)
    value = entropy.mul_(distance).sum()
    return value, gradient.add_(distance.mul_(d).mul_(weights))


def giou_distance(boxes: Tensor, targets: Tensor) -> Tensor:
    """1 - GIoU of boxes (..., 4) XYXY and their targets, in [0, 2]."""
    overlap, union = _overlap(boxes, targets)
    hull = torch.maximum(boxes[..., 2:], targets[..., 2:]) - torch.minimum(
        boxes[..., :2], targets[..., :2]
    )
    hull = hull.clamp(min=0).prod(dim=-1).clamp(min=SMALLEST)
    return 1 - overlap / union + (hull - union) / hull


def log_distance(boxes: Tensor, targets: Tensor) -> Tensor:
    """-ln IoU of boxes (..., 4) XYXY and their targets, in [0, 13.9].

    An IoU below 1e-6 counts as that and has no gradient. A box without area, which FCOS' rectified
    distances allow, overlaps nothing, not even itself.
    """
    overlap, union = _overlap(boxes, targets)
    return -(overlap / union).clamp(min=SMALLEST).log()


def _overlap(boxes: Tensor, targets: Tensor) -> tuple:
    """Areas of intersection and union."""
    start = torch.maximum(boxes[..., :2], targets[..., :2])
    end = torch.minimum(boxes[..., 2:], targets[..., 2:])
    overlap = (end - start).clamp(min=0).prod(dim=-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(dim=-1) for x in (boxes, targets)]
    return overlap, (areas[0] + areas[1] - overlap).clamp(min=SMALLEST)


DISTANCES = {"RetinaNet": giou_distance, "FCOS": log_distance}


def box_sum(
    crossed: Tensor,
    taught: Tensor,
    weights: Tensor,
    decode: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Sum over anchors of w · distance(decoded crossed, decoded taught), scalar.

    Args:
        crossed: (N, A*4, H, W), receives gradient. taught: the same shape. weights: (N, A, H, W).
        decode: (N, H*W*A, 4) → boxes of that shape. distance: of two such, (N, H*W*A).
    """
    targets, rows = decode(by_anchor(taught.detach())), weights.permute(0, 2, 3, 1).flatten(1)
    return held(lambda x: (distance(decode(by_anchor(x)), targets) * rows).sum(), crossed)


def by_anchor(deltas: Tensor) -> Tensor:
    """(N, A*4, H, W) → (N, H*W*A, 4)."""
    n, channels, height, width = deltas.shape
    return deltas.view(n, channels // 4, 4, height, width).permute(0, 3, 4, 1, 2).reshape(n, -1, 4)


@METHOD_REGISTRY.register()
class CrossKD(Method):
    """L = sum over levels of CLASS_WEIGHT · L_class + BOX_WEIGHT · L_box; see the equations above.

    Images without objects are taught as others: no term is about ground-truth boxes, which only
    say which anchors are ignored, and A.

    Args:
        levels: [], for it takes those of the heads. cut: i, and before or after ReLU. beta: β.
    """

    terms = ("class", "box")
    needs = frozenset({"teacher", "heads"})

    def __init__(
        self, levels: Sequence[Level], weights: Mapping[str, float], cut: Cut, beta: float = 1.0
    ):
        super().__init__(levels, weights)
        self.cut, self.beta = cut, beta

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # No unit. The authors take 1 and 1 for RetinaNet, 0.4 and 0.75 for FCOS.
        node.CLASS_WEIGHT = 1.0
        node.BOX_WEIGHT = 1.0
        # How much wrong predictions count more than nearly right ones in the class term.
        node.BETA = 1.0
        # The teacher's head takes over after this many of the student's convolutions, at most
        # MODEL.RETINANET.NUM_CONVS or MODEL.FCOS.NUM_CONVS; 0 = it is given the level itself. The
        # authors take 3 of 4, for FCOS 2.
        node.REUSED_FROM = 3
        # Hand over maps before the ReLU of that convolution instead of after it.
        node.BEFORE_ACTIVATION = False

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        key = "MODEL.DISTILLER.CROSSKD"
        if not (node.BETA == 0 or 1 <= node.BETA < float("inf")):
            raise UserError(f"{key}.BETA: {node.BETA} is neither 0 nor a number from 1 on")
        if node.REUSED_FROM < 0:
            raise UserError(f"{key}.REUSED_FROM: {node.REUSED_FROM} is not a number from 0 on")

    @classmethod
    def cuts_of(cls, node: CfgNode) -> Dict[str, Cut]:
        return {"REUSED_FROM": Cut(node.REUSED_FROM, not node.BEFORE_ACTIVATION)}

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "CrossKD":
        node = cls.node(cfg)
        return cls(levels, cls.weights_of(node), cls.cuts_of(node)["REUSED_FROM"], node.BETA)

    def forward(self, batch: Batch) -> Table:
        """Level → "class" and "box", weighted."""
        heads = batch.heads
        targets = heads.targets()
        factor = targets.average_factor + EPSILON
        found: Table = {}
        for name in heads.levels:
            counted = targets.labels[name] >= 0
            sums = self._sums(heads, name, counted)
            found[name] = self.weigh({term: value / factor for term, value in sums.items()})
        return found

    def _sums(self, heads: Heads, name: str, counted: Tensor) -> Dict[str, Tensor]:
        """The sums of one level. ``counted``: (N, H*W*A) bool, anchors that are not ignored."""
        taught = heads.teacher[name]
        crossed = heads.cross(name, self.cut.conv, *self._handed(heads, name))
        (n, channels, *cells), classes = taught.logits.shape, heads.num_classes
        grid = n, channels // classes, classes, *cells
        dtype = small_dtype(crossed.logits, taught.logits)
        scores = taught.logits.to(dtype).sigmoid().view(grid)
        weights = counted.view(n, *cells, -1).permute(0, 3, 1, 2).to(dtype)
        boxes = crossed.deltas, taught.deltas, weights * scores.amax(dim=2)
        decode = lambda x: heads.decode(name, x)  # noqa: E731
        return {
            "class": class_sum(crossed.logits.view(grid), scores, weights, self.beta),
            "box": box_sum(*boxes, decode, DISTANCES[heads.family]),
        }

    def _handed(self, heads: Heads, name: str) -> List[Tensor]:
        """What the teacher's convolutions after the cut are given: class and box map."""

        def hand(student: Tensor, teacher: Moments) -> Tensor:
            maps = aligned(student, teacher)
            return maps.relu() if self.cut.conv else maps

        own, taught = heads.student[name], heads.teacher[name]
        towers = (own.class_maps, taught.class_maps), (own.box_maps, taught.box_maps)
        # Computed again in the backward pass: kept, each step would be as large as the map.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return [
            checkpoint(hand, student[self.cut], moments(teacher[self.cut]), **options)
            for student, teacher in towers
        ]
