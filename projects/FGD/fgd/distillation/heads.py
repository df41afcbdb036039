"""Dense heads, RetinaNet's and FCOS': what the student's said in a training forward, the teacher's
level by level, and the teacher's going on from the student's maps.

Recorded by hooks on modules of the student's forward; nothing of Detectron2 is replaced.
"""

from functools import cache, partial
from typing import Any, Collection, ContextManager, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import UserError
from ..methods.batch import Cut, HeadLevel, Heads, HeadTargets
from .padding import why_not_one_grid
from .towers import TOWERS, LevelRun, OnDemand, decode, place_of, steps_of

FAMILIES = {"FCOS": (FCOS, FCOSHead), "RetinaNet": (RetinaNet, RetinaNetHead)}


class RecordedHead(NamedTuple):
    """One training forward of the student's head, by its levels."""

    maps: List[Tensor]  # that it reads
    levels: List[HeadLevel]
    anchors: List[Boxes]
    autocast: Optional[torch.dtype]  # what it was computed in under AMP


class HeadTap:
    """Records one training forward of a student's dense head and hands it out exactly once.

    After ReLUs it holds references to what autograd keeps anyway. Maps before them it keeps alive
    until they are handed out and forgotten, at the cuts that are asked for alone.
    """

    def __init__(self, student: nn.Module, cuts: Collection[Cut] = ()):
        self._head, self._cuts = student.head, cuts
        self._record: Dict[Any, Any] = {}
        self._head.register_forward_pre_hook(self._begin)
        for tower in TOWERS:
            steps = steps_of(getattr(self._head, tower))
            for place in {place_of(cut) for cut in cuts} - {0}:
                save = partial(self._save_map, (tower, place))
                steps[place - 1][-1].register_forward_hook(save)
        self._head.register_forward_hook(self._save_predictions)
        student.anchor_generator.register_forward_hook(self._save_anchors)

    def _begin(self, head: nn.Module, args: tuple) -> None:
        self._record = {}
        if head.training:
            self._record["maps"] = list(args[0])

    def _save_map(self, key: Tuple[str, int], module: nn.Module, args: tuple, output) -> None:
        if self._head.training:
            self._record.setdefault(key, []).append(output)  # called once a level, in order

    def _save_predictions(self, head: nn.Module, args: tuple, output: tuple) -> None:
        if head.training:
            self._record["predictions"] = output
            kind = self._record["maps"][0].device.type
            half = torch.is_autocast_enabled(kind)
            self._record["autocast"] = torch.get_autocast_dtype(kind) if half else None

    def _save_anchors(self, generator: nn.Module, args: tuple, output: List[Boxes]) -> None:
        if self._head.training:
            self._record["anchors"] = output

    def pop(self) -> RecordedHead:
        """Of the last training forward.

        Raises:
            RuntimeError: the head has not run in training mode since the last call.
        """
        if "anchors" not in self._record:
            raise RuntimeError("the student's head did not run, or its record was taken")
        record, self._record = self._record, {}
        maps = record["maps"]

        def at(tower: str, level: int) -> Dict[Cut, Tensor]:
            places = {cut: place_of(cut) for cut in self._cuts}
            return {
                cut: record[tower, place][level] if place else maps[level]
                for cut, place in places.items()
            }

        levels = [
            HeadLevel(*said, *(None,) * (3 - len(said)), *(at(tower, k) for tower in TOWERS))
            for k, said in enumerate(zip(*record["predictions"], strict=True))
        ]
        return RecordedHead(maps, levels, record["anchors"], record["autocast"])


def heads_of(
    recorded: RecordedHead,
    student: nn.Module,
    instances: List[Instances],
    teacher: Optional[nn.Module] = None,
    taught: Optional[Mapping[int, HeadLevel]] = None,
) -> Heads:
    """Both heads on one batch.

    Args:
        student: the detector. teacher: the frozen head. taught: what it makes of its own maps, by
            the index of the level.
    """
    names = list(student.head_in_features)
    index = {name: k for k, name in enumerate(names)}
    boxes = recorded.anchors
    kind = recorded.maps[0].device.type

    def as_student() -> ContextManager:
        dtype = recorded.autocast
        return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)

    def cross(level: str, conv: int, class_map: Tensor, box_map: Tensor) -> HeadLevel:
        return LevelRun(teacher, index[level], conv, (class_map, box_map), as_student)

    def decoded(level: str, deltas: Tensor) -> Tensor:
        return decode(student.box2box_transform, boxes[index[level]].tensor, deltas)

    return Heads(
        levels=names,
        family=family(student),
        num_classes=student.num_classes,
        student=dict(zip(names, recorded.levels, strict=True)),
        teacher=None if taught is None else OnDemand(names, lambda k: taught[index[k]]),
        anchors={name: x.tensor for name, x in zip(names, boxes, strict=True)},
        targets=cache(lambda: targets_of(student, names, boxes, instances)),
        cross=cross,
        decode=decoded,
    )


def check_grids(recorded: RecordedHead, names: List[str], maps: List[Tensor]) -> None:
    """Raise UserError unless the teacher's head reads ``maps`` of the student's grids."""
    for name, own, other in zip(names, recorded.maps, maps, strict=True):
        if own.shape[-2:] != other.shape[-2:]:
            own, other = ("x".join(map(str, x.shape[-2:])) for x in (own, other))
            raise UserError(
                f"cannot distil the head on {name!r}: the student's grid has {own} cells, the "
                f"teacher's {other}; take a teacher whose backbone rounds sizes as the student's"
            )


@torch.no_grad()
def targets_of(
    student: nn.Module, names: List[str], anchors: List[Boxes], instances: List[Instances]
) -> HeadTargets:
    """By the student's own assignment, which is a function of anchors and ground truth alone."""
    assigned, boxes = student.label_anchors(anchors, instances)
    labels = torch.stack(assigned)
    positive = (labels >= 0) & (labels < student.num_classes)
    if family(student) == "FCOS":
        centerness = student.compute_ctrness_targets(anchors, boxes)  # NaN away from objects
        total = centerness.where(positive, 0.0).sum().float()
    else:
        total = positive.sum(dim=1).clamp(min=1).sum().float()
    parts = labels.split([len(x) for x in anchors], dim=1)
    factor = mean_over_processes(total).clamp(min=1)
    return HeadTargets(dict(zip(names, parts, strict=True)), factor)


def mean_over_processes(value: Tensor) -> Tensor:
    count = comm.get_world_size()
    if count == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / count


def family(model: Optional[nn.Module]) -> str:
    """ "RetinaNet" or "FCOS"; "" for a detector without such a head.

    A head with a forward of its own is none, for its modules alone do not say what it computes.
    """
    head = getattr(model, "head", None)
    for name, (detector, kind) in FAMILIES.items():
        if isinstance(model, detector) and type(head).forward is kind.forward:
            plain = all(steps_of(getattr(head, tower)) for tower in TOWERS)
            coder = Box2BoxTransformLinear if name == "FCOS" else Box2BoxTransform
            return name if plain and isinstance(model.box2box_transform, coder) else ""
    return ""


def why_no_heads(
    student: nn.Module, teacher: Optional[nn.Module], cuts: Optional[Mapping[str, Cut]] = None
) -> str:
    """Why the dense heads of a pair cannot be compared; "" if they can.

    Args:
        cuts: where maps are taken, by the key that says so; towers have to be equally wide there.
    """
    sides = {"student": student, "teacher": teacher}
    sides = {who: model for who, model in sides.items() if model is not None}
    for who, model in sides.items():
        if not family(model):
            return f"the {who}, {type(model).__name__}, has no plain head of RetinaNet or FCOS"
    if teacher is not None and (reason := why_not_one_grid(student.backbone, teacher.backbone)):
        return reason
    facts = [_facts(model) for model in sides.values()]
    for what in facts[0]:
        own, *other = (str(x[what]) for x in facts)
        if other and own != other[0]:
            return f"{what}: the student has {own}, the teacher {other[0]}"
    for key, cut in (cuts or {}).items():
        reason = _why_no_cut(sides, key, cut)
        if reason:
            return reason
    return ""


def _facts(model: nn.Module) -> Dict[str, Any]:
    """What has to be the same on both sides."""
    generator, coder = model.anchor_generator, model.box2box_transform
    linear = isinstance(coder, Box2BoxTransformLinear)
    return {
        "family": family(model),
        "classes": model.num_classes,
        "levels of the head": len(model.head_in_features),
        "strides": generator.strides,
        "anchors per cell": generator.num_anchors,
        "anchors around a cell": [x.tolist() for x in generator.cell_anchors],
        "offset of anchors": generator.offset,
        "weights of box deltas": coder.normalize_by_size if linear else tuple(coder.weights),
    }


def _why_no_cut(sides: Mapping[str, nn.Module], key: str, cut: Cut) -> str:
    place = f"after convolution {cut.conv} ({key})"
    widths = {}
    for who, model in sides.items():
        steps = steps_of(model.head.cls_subnet)
        if 2 * cut.conv > len(steps):
            return f"maps are taken {place} of the towers, and the {who}'s have {len(steps) // 2}"
        convolutions = [step[0] for step in steps[::2]] + [model.head.cls_score]
        widths[who] = convolutions[cut.conv].in_channels
    if len(set(widths.values())) > 1:
        own, other = widths.values()
        return f"{place} the student's towers are {own} channels wide, the teacher's {other}"
    return ""
