"""Regions of a dense student, RetinaNet or FCOS: boxes that its head finds, as proposals for the
second stage of a teacher.

A cell and anchor that made a box stands for it in the student, so each box is followed back to
them. Detectron2's own `find_top_rpn_proposals` does the same with boxes but forgets where they are
from. The numbers are those of a working third-party G-DetKD (LutingWang/HEAD), the rules RPN's.
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from ..methods.batch import Cut, Regions, RegionSizes, RegionView, Size
from .heads import RecordedHead, family
from .regions import box_head_width, has_roi_heads, why_no_roi_heads
from .towers import steps_of

CANDIDATES = 2000  # of each level, by the score of their best class
NMS_IOU = 0.7  # among the boxes of a level, whatever their class
KEPT = 1000  # of an image, after it
OBJECT_IOU = 0.5  # with ground truth, for a box to be an object
SAMPLED = 512  # of an image
OBJECTS = 0.25  # of them, at most


class Found(NamedTuple):
    """Boxes of one image, R of them, without gradient.

    ``boxes`` (R, 4) in pixels, cut to the image; ``level`` and ``row`` (R,) say where in the head
    each was made, rows being cells and then the anchors of a cell; ``labels`` (R,) and ``targets``
    (R, 4) as in `Regions`.
    """

    boxes: Tensor
    level: Tensor
    row: Tensor
    labels: Tensor
    targets: Tensor

    def __getitem__(self, rows) -> "Found":
        return Found(*(x[rows] for x in tuple(self)))


@torch.no_grad()
def propose(
    head: RecordedHead,
    student: nn.Module,
    instances: Sequence[Instances],
    sizes: Sequence[Size],
    generator: torch.Generator,
) -> List[Found]:
    """Boxes of each image: the best ones, sampled by whether they are objects.

    Ground truth is not among them. Boxes that are empty or not finite are left out, so an image may
    have none.

    Args:
        instances: ground truth of each image. sizes: (height, width) of each. generator: the
            process's own is not touched, so that the student draws what it draws alone.
    """
    found = []
    for image, (objects, size) in enumerate(zip(instances, sizes, strict=True)):
        labelled = label(*best_boxes(head, student, image, size), objects, student.num_classes)
        found.append(labelled[sample(labelled.labels, student.num_classes, generator)])
    return found


def best_boxes(
    head: RecordedHead, student: nn.Module, image: int, size: Size
) -> Tuple[Tensor, Tensor, Tensor]:
    """Boxes (R, 4), levels (R,) and rows (R,) of one image, the best score first."""
    parts = []
    for k, (level, anchors) in enumerate(zip(head.levels, head.anchors, strict=True)):
        logits, deltas = (x[image, None] for x in (level.logits, level.deltas))
        scores = permute_to_N_HWA_K(logits.float(), student.num_classes)[0].amax(dim=1)
        scores, rows = scores.topk(min(CANDIDATES, len(scores)))
        deltas = permute_to_N_HWA_K(deltas.float(), 4)[0][rows]
        boxes = student.box2box_transform.apply_deltas(deltas, anchors.tensor[rows])
        parts.append((boxes, scores, torch.full_like(rows, k), rows))
    boxes, scores, levels, rows = (torch.cat(x) for x in zip(*parts, strict=True))
    valid = boxes.isfinite().all(dim=1) & scores.isfinite()
    boxes, scores, levels, rows = (x[valid] for x in (boxes, scores, levels, rows))
    clipped = Boxes(boxes)
    clipped.clip(size)
    inside = clipped.nonempty()
    boxes, scores, levels, rows = (x[inside] for x in (clipped.tensor, scores, levels, rows))
    keep = batched_nms(boxes, scores, levels, NMS_IOU)[:KEPT]
    return boxes[keep], levels[keep], rows[keep]


def label(boxes: Tensor, level: Tensor, row: Tensor, objects: Instances, num_classes: int) -> Found:
    """The class of the object that each box overlaps most, if by IoU 0.5; else background."""
    if not len(objects):
        labels = torch.full_like(row, num_classes)
        return Found(boxes, level, row, labels, boxes)
    matcher = Matcher([OBJECT_IOU], [0, 1], allow_low_quality_matches=False)
    index, positive = matcher(pairwise_iou(objects.gt_boxes, Boxes(boxes)))
    labels = objects.gt_classes[index].where(positive == 1, num_classes)
    return Found(boxes, level, row, labels, objects.gt_boxes.tensor[index])


def sample(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Rows of at most 512 boxes, a quarter of them objects, or fewer if there are fewer.

    As Detectron2's `subsample_labels`, whose numbers come from the process's generator.
    """
    order = torch.randperm(len(labels), generator=generator, device=labels.device)
    drawn = labels[order]
    positive = order[(drawn >= 0) & (drawn < num_classes)][: int(OBJECTS * SAMPLED)]
    negative = order[drawn == num_classes][: SAMPLED - len(positive)]
    return torch.cat([positive, negative])


def dense_regions(
    found: Sequence[Found], head: RecordedHead, student: nn.Module, teacher: Optional[RegionView]
) -> Regions:
    """Of `propose`; ``teacher``: what the teacher says of the same boxes."""
    anchors = student.anchor_generator.num_anchors[0]
    rows = torch.cat([x.row for x in found])
    levels = torch.cat([x.level for x in found])
    images = torch.cat([torch.full_like(x.row, n) for n, x in enumerate(found)])
    end = tower_end(student)
    maps = [level.class_maps[end] for level in head.levels]
    embedding = at_cells(maps, levels, images, rows.div(anchors, rounding_mode="floor"))
    return Regions(
        boxes=[x.boxes for x in found],
        labels=torch.cat([x.labels for x in found]),
        targets=torch.cat([x.targets for x in found]),
        num_classes=student.num_classes,
        student=RegionView(None, embedding, None, None),
        teacher=teacher,
        anchors=rows % anchors,
    )


def at_cells(maps: Sequence[Tensor], levels: Tensor, images: Tensor, cells: Tensor) -> Tensor:
    """(R, C): of each row the values in a cell of a level's map; gradients flow into the maps.

    Args:
        maps: (N, C, H, W) of each level. levels, images, cells: (R,), cells counted row by row.
    """
    own = torch.arange(len(cells), device=cells.device)
    every = [x.flatten(2)[images, :, cells.clamp(max=x[0, 0].numel() - 1)] for x in maps]
    return torch.stack(every)[levels, own]


def tower_end(student: nn.Module) -> Cut:
    """What the class predictor of a dense head reads."""
    return Cut(len(steps_of(student.head.cls_subnet)) // 2)


def why_no_regions(student: nn.Module, teacher: Optional[nn.Module]) -> str:
    """Why there are no boxes that a teacher's second stage could look at too; "" if there are."""
    if not family(student) and not has_roi_heads(student):
        return (
            f"the student, {type(student).__name__}, has neither RoI heads over a pyramid nor a "
            "plain head of RetinaNet or FCOS"
        )
    return why_no_roi_heads(None, teacher)


def why_no_region_embeddings(student: nn.Module, teacher: Optional[nn.Module]) -> str:
    """Why there are no vectors of them; "" if there are."""
    reason = why_no_regions(student, teacher)
    for who, model in (("student", student), ("teacher", teacher)):
        if not reason and model is not None and not _width(model):
            return f"the {who}'s box head ends in a map, not in a vector (ROI_BOX_HEAD.NUM_FC 0)"
    return reason


def region_sizes(student: nn.Module, teacher: nn.Module) -> RegionSizes:
    """Of a pair that has regions."""
    heads = teacher.roi_heads
    channels = teacher.backbone.output_shape()[heads.box_in_features[0]].channels
    anchors = student.anchor_generator.num_anchors[0] if family(student) else 1
    cells = heads.box_pooler.output_size[0]
    return RegionSizes(channels, cells, _width(student), _width(teacher), anchors)


def _width(model: nn.Module) -> int:
    return model.head.cls_score.in_channels if family(model) else box_head_width(model)
