"""The meta-architecture that trains a student under a frozen teacher."""

import logging
from typing import Callable, Collection, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config import student_config
from ..errors import UserError
from ..methods.batch import Batch, Cut, Heads, Regions, RegionView, SecondView
from ..methods.method import Table, over_levels
from .config import asked_cuts, asked_for, check_distiller
from .dense_regions import dense_regions, propose, tower_end
from .heads import HeadTap, RecordedHead, check_grids, heads_of
from .inherit import heritage, inherit
from .needs import wants_regions
from .plan import freeze_teacher, make_plan, summarize
from .regions import Recorded, RegionTap, has_roi_heads, regions_of
from .schedule import ALWAYS, Schedule, schedule_from_config
from .second_view import check_second_images, has_second_images, look_again
from .taps import FeatureTap, Source, Sources, read_levels
from .teacher import FrozenTeacher, TeacherView, build_teacher
from .unlabeled import NO_TERMS, UnlabeledTerms, split, unlabeled_terms, without_boxes

logger = logging.getLogger(__name__)

Features = Dict[str, Tensor]  # by the student's level
_SAMPLING = 1 << 16  # of random numbers, which methods key by level and image


class Seen(NamedTuple):
    """What was recorded of one forward of the student.

    Attributes:
        features: its maps of the distilled levels. padded_size: (height, width) of the batch.
        regions, head: of a training forward, where a method needs them.
    """

    features: Features
    padded_size: Tuple[int, int]
    regions: Optional[Recorded] = None
    head: Optional[RecordedHead] = None


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """Trains ``student`` with its own losses plus a method's; in eval mode it is the student.

    ``student`` and ``distillation`` are trained; the teacher is not a submodule (see
    `FrozenTeacher`). Checkpoints are written from ``student`` (see `fgd.engine.checkpoint`).

    ``factor`` is what the terms of the last training step were multiplied by, that of the schedule
    times ``multiplier``, ``table`` those terms before it, level by level and detached; {} after a
    step with factor 0. ``multiplier`` is 1 unless something adapts it. ``seed`` is what a method's
    random numbers are made from. ``watch``, if set, is called with each batch that the method is
    given.

    A method that needs "second_view" makes both backbones run twice (see `second_view`), but not
    from INPUT.PLAIN_FROM on nor at factor 0.

    Args:
        student: a Detectron2 detector with a ``backbone``.
        teacher: None for a method that needs none, and where the student only inherits.
        distillation: a method of METHOD_REGISTRY or a sum of several; None where the student only
            inherits (MODEL.DISTILLER.METHOD "").
        inheritable: the teacher's neck and head, to be copied by `inherit_from_teacher`, or None.
        sources: what is distilled of the student's backbone; None = all its outputs.
        asked_for: what the method needs, of `fgd.methods.method.NEEDS`.
        cuts: where it takes maps out of the towers of dense heads.
        same_grid: levels whose cells are compared with the teacher's; None = all.
        schedule: the common factor on the method's terms, by iteration.
        plain_from: the iteration from which samples have no second images; 0 = never.
        unlabeled: which terms count on images without labels.
        summary: one line that says what is distilled from what.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Optional[FrozenTeacher],
        distillation: Optional[nn.Module],
        inheritable: Optional[Dict[str, Tensor]] = None,
        sources: Optional[Sources] = None,
        asked_for: Collection[str] = ("teacher", "maps"),
        cuts: Collection[Cut] = (),
        same_grid: Optional[Sequence[str]] = None,
        schedule: Schedule = ALWAYS,
        plain_from: int = 0,
        unlabeled: UnlabeledTerms = NO_TERMS,
        summary: str = "",
    ):
        super().__init__()
        self.student, self.distillation = student, distillation
        self.teacher, self.unlabeled = teacher, unlabeled
        self.summary = summary
        self._inheritable = inheritable
        self.sources, self.schedule = sources, schedule
        self._same_grid, self._plain_from = same_grid, plain_from
        self.factor, self.multiplier, self.seed = 0.0, 1.0, 0
        self.table: Dict[str, Dict[str, Tensor]] = {}
        self.watch: Optional[Callable[[Batch], None]] = None
        self.asked_for, self._cuts = frozenset(asked_for), cuts
        if distillation is not None:
            self._tap = FeatureTap(student.backbone, sources)
        regions = wants_regions(self.asked_for)
        two_stage = has_roi_heads(student)
        self._region_tap = RegionTap(student.roi_heads) if regions and two_stage else None
        self._dense_regions = regions and not two_stage
        end = [tower_end(student)] if self._dense_regions else []
        heads = "heads" in self.asked_for or self._dense_regions
        self._head_tap = HeadTap(student, [*cuts, *end]) if heads else None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_distiller(cfg)
        student = build_model(student_config(cfg))
        # Teacher and distillation modules draw random numbers for weights of their own. The
        # student's run must not notice: with all weights at 0 it equals the plain student's.
        with torch.random.fork_rng():
            model, teacher_cfg = build_teacher(cfg)
            plan = make_plan(cfg, student, model)
        inheritable = heritage(model, student) if cfg.MODEL.DISTILLER.INHERIT else None
        return {
            "student": student,
            "teacher": freeze_teacher(cfg, model, teacher_cfg, plan),
            "distillation": plan.method,
            "inheritable": inheritable,
            "sources": plan.sources,
            "asked_for": asked_for(cfg),
            "cuts": asked_cuts(cfg),
            "same_grid": plan.same_grid,
            "schedule": schedule_from_config(cfg),
            "plain_from": cfg.INPUT.PLAIN_FROM,
            "unlabeled": unlabeled_terms(cfg),
            "summary": summarize(cfg, teacher_cfg, plan),
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def loss_names(self) -> Tuple[str, ...]:
        """Of all terms, those of images without labels last."""
        return (*self.distillation.loss_names, *self.unlabeled.loss_names)

    def inherit_from_teacher(self) -> None:
        """Copy the teacher's neck and head, once, if MODEL.DISTILLER.INHERIT asks for it.

        The trainer calls this after the student's own weights are loaded, and not on ``--resume``.
        """
        if self._inheritable is not None:
            logger.info(f"Inherited from the teacher:\n{inherit(self.student, self._inheritable)}")
            self._inheritable = None

    def describe(self) -> str:
        """One line for the log: is distillation on, and with what."""
        return self.summary

    def forward(self, batched_inputs: List[dict]):
        """Training: dict of named scalar losses. Inference: the student's list[dict]."""
        if not self.training or self.distillation is None:
            return self.student(batched_inputs)
        batched_inputs, unlabeled = split(batched_inputs)
        losses, seen = self.run_student(batched_inputs)
        iteration = get_event_storage().iter
        if "second_view" in self.asked_for:
            check_second_images(batched_inputs, iteration, self._plain_from)
        self.factor, self.table = self.schedule.value(iteration) * self.multiplier, {}
        if self.factor == 0:
            zero = _zero(*self.distillation.parameters(), *seen.features.values())
            return {**losses, **dict.fromkeys(self.loss_names, zero)}
        table = self.terms(self.batch(seen, batched_inputs, iteration))
        if unlabeled:
            table = {**table, **self._terms_without_labels(unlabeled, iteration)}
        return {**losses, **self._sum(table)}

    def run_student(self, batched_inputs: List[dict]) -> Tuple[Dict[str, Tensor], Seen]:
        """A training forward of the student: its own losses, and what the method may see of it."""
        losses = self.student(batched_inputs)
        features, padded_size = self._tap.pop()
        regions = self._region_tap.pop() if self._region_tap else None
        head = self._head_tap.pop() if self._head_tap else None
        return losses, Seen(features, padded_size, regions, head)

    def batch(self, seen: Seen, batched_inputs: List[dict], iteration: int = 0) -> Batch:
        """What the method is given; runs the teacher.

        Args:
            seen: of the student. batched_inputs: mapped dataset dicts with instances.
        Raises:
            UserError: the grids of a level differ between student and teacher.
        """
        features, padded_size, recorded, head = seen
        taught = TeacherView({}, {})
        if self.teacher is not None:
            taught = self.teacher.look(batched_inputs, padded_size)
        self._check_grids(features, taught.maps, padded_size)
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        batch = Batch(
            student=features,
            teacher=taught.maps,
            instances=instances,
            image_sizes=[tuple(x["image"].shape[-2:]) for x in batched_inputs],
            padded_size=padded_size,
            iteration=iteration,
            seed=self.seed,
            rank=comm.get_rank(),
            second_view=self._second_view(batched_inputs, padded_size),
        )
        if recorded is not None:
            batch.regions = self._regions(recorded, taught)
        if head is not None and self._dense_regions:
            batch.regions = self._regions_of_head(head, taught, batch)
        if head is not None and "heads" in self.asked_for:
            batch.heads = self._heads(head, taught, instances)
        return batch

    def _second_view(
        self, batched_inputs: List[dict], padded_size: Tuple[int, int]
    ) -> Optional[SecondView]:
        if "second_view" not in self.asked_for or not has_second_images(batched_inputs):
            return None
        sides = self.student, self.teacher, self.sources
        view = look_again(*sides, batched_inputs, padded_size)
        if self.student.backbone.training:
            # The tap, which has handed out the first forward, records this one like any, and would
            # keep its maps alive until the next step.
            self._tap.pop()
        return view

    def _regions(self, recorded: Recorded, taught: TeacherView) -> Regions:
        view = self._teacher_of(recorded.boxes, taught)
        return regions_of(recorded, self.student.roi_heads, view)

    def _regions_of_head(self, head: RecordedHead, taught: TeacherView, batch: Batch) -> Regions:
        generator = batch.generator(self.device, _SAMPLING)
        found = propose(head, self.student, batch.instances, batch.image_sizes, generator)
        view = self._teacher_of([Boxes(x.boxes) for x in found], taught)
        return dense_regions(found, head, self.student, view)

    def _teacher_of(self, boxes: List[Boxes], taught: TeacherView) -> Optional[RegionView]:
        if self.teacher is None or "roi_heads" not in self.teacher.parts:
            return None
        return self.teacher.regions(taught.outputs, boxes)

    def _heads(self, recorded: RecordedHead, taught: TeacherView, instances: list) -> Heads:
        if self.teacher is None:
            return heads_of(recorded, self.student, instances)
        maps = self.teacher.head_maps(taught.outputs)
        check_grids(recorded, self.student.head_in_features, maps)
        view = self.teacher.head(maps, self._cuts)
        return heads_of(recorded, self.student, instances, self.teacher.parts["head"], view)

    def terms(self, batch: Batch) -> Table:
        """The method's weighted scalars by level, before the schedule's factor; fills ``table``."""
        if self.watch is not None:
            self.watch(batch)
        with torch.autocast(self.device.type, enabled=False):
            found = self.distillation.table(batch)
        self.table = _detached(found)
        return found

    def _terms_without_labels(self, batched_inputs: List[dict], iteration: int) -> Table:
        """Those of images without labels; adds them to ``table``."""
        seen = self.read_student(batched_inputs)
        if self.student.backbone.training:
            self._tap.pop()  # as for second images
        if self.unlabeled.score:
            boxes = self.teacher.detect(batched_inputs, self.unlabeled.score)
        else:
            boxes = without_boxes(batched_inputs, self.device)
        given = [{**x, "instances": own} for x, own in zip(batched_inputs, boxes, strict=True)]
        batch = self.batch(seen, given, iteration)
        with torch.autocast(self.device.type, enabled=False):
            found = self.unlabeled.table(self.distillation, batch)
        self.table.update(_detached(found))
        return found

    def _sum(self, table: Table) -> Dict[str, Tensor]:
        """Each term over all levels times the factor; 0 where a batch has none."""
        zero = _zero(*self.distillation.parameters())
        losses = {f"loss_{name}": value for name, value in over_levels(table).items()}
        if self.factor != 1:
            losses = {name: self.factor * value for name, value in losses.items()}
        return {name: losses.get(name, 0.0) + zero for name in self.loss_names}

    def _check_grids(
        self, student: Features, taught: Features, padded_size: Tuple[int, int]
    ) -> None:
        for name in student.keys() & taught.keys():
            if self._same_grid is not None and name not in self._same_grid:
                continue
            own, other = ("x".join(map(str, x[name].shape[-2:])) for x in (student, taught))
            if own != other:
                partner = (self.teacher.sources or {}).get(name, Source(name)).output
                raise UserError(
                    f"cannot distil {name!r}: in a batch padded to {padded_size[0]}x"
                    f"{padded_size[1]} pixels the student's {name!r} has a grid of {own} cells, "
                    f"the teacher's {partner!r} one of {other}; choose another with "
                    "MODEL.DISTILLER.LEVEL_MAP, or leave the level out with MODEL.DISTILLER.LEVELS"
                )

    def read_student(self, batched_inputs: List[dict]) -> Seen:
        """The student's distilled features in its present mode, without its heads."""
        images = self.student.preprocess_image(batched_inputs).tensor
        features, _ = read_levels(self.student.backbone, images, self.sources)
        return Seen(features, tuple(images.shape[-2:]))


def _detached(table: Table) -> Table:
    return {
        level: {name: value.detach() for name, value in terms.items()}
        for level, terms in table.items()
    }


def _zero(*parts: Tensor) -> Tensor:
    """0 that every part takes part in.

    DistributedDataParallel waits for the gradient of each parameter, also of those that only
    distillation reaches, at factor 0 or in a batch without objects.
    """
    return sum((0.0 * part[(0,) * part.dim()].float() for part in parts), torch.zeros(()))
