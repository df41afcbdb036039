"""What a distillation method is given: levels when it is built, a batch at each step."""

from dataclasses import dataclass, field, replace
from typing import Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor

Maps = Dict[str, Tensor]  # by the student's level, (N, C, H, W)
Size = Tuple[int, int]  # height, width


class Level(NamedTuple):
    """One distilled level; the loss, its modules and the log go by ``name``."""

    name: str  # of the student's output
    student_channels: int
    teacher_channels: int
    teacher_name: str = ""  # of the teacher's output; "" where no teacher is involved
    stride: int = 0  # of the student's output, in pixels; 0 where it states none
    stage: bool = False  # an output of the bottom-up network, below the pyramid


class RegionSizes(NamedTuple):
    """What modules for regions are built from; as Level is for maps."""

    channels: int  # C of the teacher's RoI features
    cells: int  # S of them, each way
    student_width: int  # D of the student's embedding; 0 where it is no vector
    teacher_width: int  # of the teacher's
    anchors: int = 1  # per cell of a dense student; 1 for a two-stage one


class RegionView(NamedTuple):
    """What one network makes of R regions; None for what its kind of head does not have."""

    features: Optional[Tensor]  # (R, C, S, S) pooled from the level of each region
    # (R, D) of the box head. Of a dense head its class tower's last map, in the cell that made the
    # box.
    embedding: Optional[Tensor]
    logits: Optional[Tensor]  # (R, K+1), the last one of background
    deltas: Optional[Tensor]  # (R, 4) or (R, 4K)


@dataclass
class Regions:
    """Boxes that the student found, R in all images together.

    Those that its second stage was trained on; of a dense student what
    `fgd.distillation.dense_regions` samples from all that its head found.

    Attributes:
        boxes: of each image, (R_i, 4) XYXY in pixels of the network input, without gradient.
        labels: (R,) class of each, 0..K-1, or K for background.
        targets: (R, 4) the object that each matches best; means nothing for background.
        student: gradients flow into it. teacher: of the same boxes, without gradient; None where no
            method looks at a teacher's regions.
        delta_weights: by which both scale box deltas, of (x, y, width, height).
        anchors: (R,) the number of the anchor, of those of its cell, that a dense student made the
            box from; None for a two-stage student.
    """

    boxes: List[Tensor]
    labels: Tensor
    targets: Tensor
    num_classes: int
    student: RegionView
    teacher: Optional[RegionView]
    delta_weights: Tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    anchors: Optional[Tensor] = None

    @property
    def positive(self) -> Tensor:
        """(R,) bool: not background, and not a class of -1, which is ignored."""
        return (self.labels >= 0) & (self.labels < self.num_classes)


class Cut(NamedTuple):
    """A place in the two towers of a dense head, whose steps are convolution, norm and ReLU."""

    conv: int  # convolutions before it; 0 is the level itself
    activated: bool = True  # after the last one's ReLU, or before it; the same at 0


@dataclass
class HeadLevel:
    """What one network's dense head makes of one level; A anchors per cell, K classes.

    Attributes:
        logits: (N, A*K, H, W), anchor by anchor, of K independent classes without background.
        deltas: (N, A*4, H, W), what `Heads.decode` reads.
        centerness: (N, A, H, W) logits of FCOS; None for RetinaNet.
        class_maps, box_maps: (N, C, H, W) in the two towers, at the cuts of the chosen methods.
    """

    logits: Tensor
    deltas: Tensor
    centerness: Optional[Tensor] = None
    class_maps: Mapping[Cut, Tensor] = field(default_factory=dict)
    box_maps: Mapping[Cut, Tensor] = field(default_factory=dict)


class HeadTargets(NamedTuple):
    """What the student's own assignment makes of the ground truth.

    ``average_factor`` is what sums over all anchors of this process are divided by, a scalar > 0:
    the mean over processes of its images' positive anchors, of each image at least 1. FCOS: of the
    summed centerness of the ground truth at positive points, at least 1.
    """

    labels: Dict[str, Tensor]  # (N, H*W*A) by level: 0..K-1, K background, -1 ignored
    average_factor: Tensor


@dataclass
class Heads:
    """The dense heads of both networks, RetinaNet's or FCOS', on levels of equal grids.

    Nothing of the teacher and nothing of `targets` is computed before it is asked for, and then
    once. Rows of anchors are in the order of cells, row by row, then of anchors in a cell.

    Attributes:
        levels: names of what the student's head reads, finest first; keys of all that follows.
        family: "RetinaNet" or "FCOS".
        student: gradients flow into it. teacher: of its own maps, without gradient; None for a
            method without a teacher.
        anchors: (H*W*A, 4) XYXY in pixels of the network input; squares around FCOS' points.
        targets: of the batch. Processes wait for each other there: all have to ask.
        cross: (level, conv, class map, box map) → what the teacher's head makes of such maps
            (N, C, H, W) from after its ``conv`` first convolutions, their ReLU included. Gradients
            flow into the maps, not into its weights, which are frozen. It computes as the student
            did: in half precision under AMP.
        decode: (level, deltas (N, H*W*A, 4)) → boxes (N, H*W*A, 4) XYXY in pixels, as the
            detectors decode; in float32, or float64 if the deltas are.
    """

    levels: List[str]
    family: str
    num_classes: int
    student: Mapping[str, HeadLevel]
    teacher: Optional[Mapping[str, HeadLevel]]
    anchors: Dict[str, Tensor]
    targets: Callable[[], HeadTargets]
    cross: Callable[[str, int, Tensor, Tensor], HeadLevel]
    decode: Callable[[str, Tensor], Tensor]


@dataclass
class SecondView:
    """The batch's second images, as student and teacher see them.

    They have the geometry of the first ones: cell by cell the same place.

    Attributes:
        student: maps of the distilled levels, of a second forward of the student's backbone;
            gradients flow into them. teacher: under the same names, without gradient. Both as the
            heads read them, after the norms of the pyramid, whatever MODEL.DISTILLER.FEATURES is.
    """

    student: Maps
    teacher: Maps

    def only(self, names: Iterable[str]) -> "SecondView":
        return SecondView(*(_only(maps, names) for maps in (self.student, self.teacher)))


def _only(maps: Maps, names: Iterable[str]) -> Maps:
    return {name: maps[name] for name in names if name in maps}


@dataclass
class Batch:
    """A training batch of N images as student and teacher see it.

    Attributes:
        student: maps of the distilled levels; gradients flow into them.
        teacher: maps under the same names, without gradient; of no level that none teaches. With
            ``same_grid`` methods both have the same N, H and W.
        instances: ground truth of each image on the device of the maps: ``gt_boxes`` XYXY in
            pixels of the network input, ``gt_classes`` in 0..K-1; either may have no row.
        image_sizes: of each image before padding. padded_size: of the batch, which maps cover.
        iteration, seed, rank: what random numbers are made from, see `generator`.
        regions, heads: None unless a method needs them (`fgd.methods.method.NEEDS`).
        second_view: None unless a method needs it; None too in iterations without second images,
            from INPUT.PLAIN_FROM on, where a term about it has no value, and in pictures of a run.
    """

    student: Maps
    teacher: Maps
    instances: List[Instances]
    image_sizes: List[Size]
    padded_size: Size
    iteration: int = 0
    seed: int = 0
    rank: int = 0
    regions: Optional[Regions] = None
    heads: Optional[Heads] = None
    second_view: Optional[SecondView] = None

    @property
    def boxes(self) -> List[Tensor]:
        """Ground-truth boxes of each image, (R_i, 4)."""
        return [x.gt_boxes.tensor for x in self.instances]

    def generator(self, device: torch.device, *key: int) -> torch.Generator:
        """Random numbers that depend on seed, iteration, rank and ``key`` alone.

        So a resumed run draws what the uninterrupted one draws, and ranks draw different ones.
        """
        parts = (self.seed, self.iteration, self.rank, *key)
        state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
        return torch.Generator(device).manual_seed(int(state >> 1))

    def images(self, rows: List[int]) -> "Batch":
        """Maps and boxes of some of the images, in a batch of the same padded size."""
        return replace(
            self,
            student={name: x[rows] for name, x in self.student.items()},
            teacher={name: x[rows] for name, x in self.teacher.items()},
            instances=[self.instances[i] for i in rows],
            image_sizes=[self.image_sizes[i] for i in rows],
            regions=None,
            heads=None,
            second_view=None,
        )

    def only(self, levels: Iterable[str]) -> "Batch":
        """The same batch with the maps of these levels alone."""
        names = list(levels)
        second = self.second_view
        return replace(
            self,
            student=_only(self.student, names),
            teacher=_only(self.teacher, names),
            second_view=None if second is None else second.only(names),
        )
