"""What a distillation method promises; everything else works with any that keeps to it.

A method is one file of this folder: a subclass of `Method`, registered, that owns its config keys,
their checks, and whatever it trains beside the student.
"""

from typing import Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..errors import UserError
from .batch import Batch, Cut, Level, RegionSizes

METHOD_REGISTRY = Registry("DISTILLATION_METHOD")

Table = Dict[str, Dict[str, Tensor]]  # level → term → scalar; "regions" is a level too

# What a method can ask for (`Method.needs`), and what that is.
NEEDS = {
    "teacher": "a teacher, MODEL.DISTILLER.TEACHER",
    "maps": "levels of the backbone, MODEL.DISTILLER.LEVELS",
    "student_maps": "levels of the student's backbone, MODEL.DISTILLER.LEVELS, without partners",
    "regions": "boxes of a two-stage student, a RetinaNet or an FCOS, and a two-stage teacher's "
    "(Faster, Mask or Cascade R-CNN's) RoI features of them",
    "region_embeddings": "vectors of boxes, by the heads of a two-stage student, a RetinaNet or an "
    "FCOS and of a two-stage teacher (Faster, Mask or Cascade R-CNN)",
    "region_logits": "RoI logits and box deltas of proposals, of the same classes",
    "heads": "dense heads of one kind, with the same classes and anchors",
    "region_deltas": "box deltas of proposals, for each class and on one scale",
    "second_view": "maps of a second image of each training image",
}


class Picture(NamedTuple):
    """An array (H, W) over the padded batch; pictures of a level in one group share a scale."""

    values: np.ndarray
    group: str = ""


class Method(nn.Module):
    """One distillation method over all its levels.

    Attributes of the class:
        terms: names of its loss terms. Each is ``loss_<method>_<term>`` in the log and has a
            weight, MODEL.DISTILLER.<METHOD>.<TERM>_WEIGHT.
        boxless: those of them that say the same whatever the boxes are, so that they count on
            images without labels, where the method needs no more than teacher and maps.
        needs: keys of `NEEDS`; what is not asked for is None in the batch and costs nothing.
        same_grid: levels are compared cell by cell, so both sides need equal strides. False: the
            maps come as they are.
    """

    terms: Tuple[str, ...] = ()
    boxless: Tuple[str, ...] = ()
    needs: FrozenSet[str] = frozenset({"teacher", "maps"})
    same_grid = True

    def __init__(self, levels: Sequence[Level], weights: Mapping[str, float]):
        """
        Args:
            levels: what it distils, [] for a method without maps.
            weights: of each of `terms`, >= 0.
        """
        super().__init__()
        self.distilled, self.weights = list(levels), dict(weights)

    @classmethod
    def prefix(cls) -> str:
        """Of its losses' names."""
        return cls.__name__.lower()

    @classmethod
    def node(cls, cfg: CfgNode) -> CfgNode:
        """Its own node, MODEL.DISTILLER.<METHOD>."""
        return cfg.MODEL.DISTILLER[cls.__name__.upper()]

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add its keys, in place; by default a weight of 1 for each term."""
        for term in cls.terms:
            node[weight_key(term)] = 1.0

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        """Raise UserError for values that cannot work; called for chosen methods only."""

    @classmethod
    def without_gpu(cls, node: CfgNode) -> None:
        """Replace, in place, settings that only a GPU can compute by their equals on a CPU."""

    @classmethod
    def needs_of(cls, node: CfgNode) -> FrozenSet[str]:
        """What it asks for under these keys; `needs` unless it depends on them."""
        return cls.needs

    @classmethod
    def cuts_of(cls, node: CfgNode) -> Dict[str, Cut]:
        """Where it takes maps out of the towers of dense heads, by the key that says so.

        For a method that needs "heads". There the towers of both sides have to be equally wide.
        """
        return {}

    @classmethod
    def pairs_by_index(cls, node: CfgNode) -> bool:
        """Whether its levels meet the teacher's by their order instead of their strides."""
        return False

    @classmethod
    def choose_levels(cls, head: Sequence[str], stages: Sequence[str]) -> List[str]:
        """The levels that it distils where MODEL.DISTILLER.LEVELS names none.

        Args:
            head: the levels that the student's head reads, finest first.
            stages: outputs of its bottom-up network, finest first.
        """
        return list(head)

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "Method":
        return cls(levels, cls.weights_of(cls.node(cfg)))

    @classmethod
    def from_pair(
        cls, cfg: CfgNode, levels: Sequence[Level], regions: Optional[RegionSizes]
    ) -> "Method":
        """What the wiring calls: `from_config`, unless modules depend on the size of regions.

        Args:
            regions: None unless the method needs regions of student and teacher.
        """
        return cls.from_config(cfg, levels)

    @classmethod
    def weights_of(cls, node: CfgNode) -> Dict[str, float]:
        return {term: node[weight_key(term)] for term in cls.terms}

    def forward(self, batch: Batch) -> Table:
        """Level → term → weighted scalar (`weigh`); autocast is off when it is called.

        Values of a level in half precision must be summed in float32 (`parts.small_dtype`), and
        images without boxes give a finite value, 0 where a term is about boxes.
        """
        raise NotImplementedError

    def weigh(self, values: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """The same times each term's weight."""
        return {term: self.weights[term] * value for term, value in values.items()}

    def pictures(self, batch: Batch, image: int) -> Dict[str, Dict[str, Picture]]:
        """Level → caption → array of one image of the batch: where maps respond, by default."""
        sides = {"teacher": batch.teacher, "student": batch.student}
        return {
            level.name: {
                f"{who} response": Picture(_response(maps[level.name][image]), "response")
                for who, maps in sides.items()
                if level.name in maps
            }
            for level in self.distilled
        }

    # What the wiring uses, of one method as of a sum of several.

    @property
    def loss_names(self) -> Tuple[str, ...]:
        return tuple(f"loss_{self.prefix()}_{term}" for term in self.terms)

    def table(self, batch: Batch) -> Table:
        """As `forward`; terms begin with the method's name, as in ``loss_names``."""
        found = self(batch.only(level.name for level in self.distilled))
        return {
            level: {f"{self.prefix()}_{term}": value for term, value in terms.items()}
            for level, terms in found.items()
        }


@torch.no_grad()
def _response(features: Tensor) -> np.ndarray:
    return features.float().abs().mean(dim=0).cpu().numpy()


class Sum(nn.Module):
    """Several methods at once, each with its own keys and terms."""

    def __init__(self, methods: Sequence[Method]):
        super().__init__()
        self.methods = nn.ModuleDict({method.prefix(): method for method in methods})

    @property
    def loss_names(self) -> Tuple[str, ...]:
        return tuple(name for method in self.methods.values() for name in method.loss_names)

    def table(self, batch: Batch) -> Table:
        found: Table = {}
        for method in self.methods.values():
            for level, terms in method.table(batch).items():
                found.setdefault(level, {}).update(terms)
        return found

    def pictures(self, batch: Batch, image: int) -> Dict[str, Dict[str, Picture]]:
        """Those of each method; of equal captions the first method's."""
        found: Dict[str, Dict[str, Picture]] = {}
        for method in self.methods.values():
            own = batch.only(level.name for level in method.distilled)
            for level, pictures in method.pictures(own, image).items():
                found[level] = {**pictures, **found.get(level, {})}
        return found


def over_levels(table: Table) -> Dict[str, Tensor]:
    """Each term summed over all levels."""
    sums: Dict[str, Tensor] = {}
    for terms in table.values():
        for name, value in terms.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def weight_key(term: str) -> str:
    """Config key of a term's weight, in its method's node."""
    return f"{term.upper()}_WEIGHT"


def chosen_methods(cfg: CfgNode) -> List[Type[Method]]:
    """The classes of MODEL.DISTILLER.METHOD, "A" or "A+B"; [] for "".

    Raises:
        UserError: a name is unknown, or there twice.
    """
    text = cfg.MODEL.DISTILLER.METHOD
    names = text.split("+") if text else []
    for name in names:
        if name not in METHOD_REGISTRY:
            known = ", ".join(name for name, _ in METHOD_REGISTRY)
            raise UserError(f"MODEL.DISTILLER.METHOD: {name!r} is unknown; there is {known}")
    if len(set(names)) < len(names):
        raise UserError(f"MODEL.DISTILLER.METHOD: {text!r} names a method twice")
    return [METHOD_REGISTRY.get(name) for name in names]


def build_method(
    cfg: CfgNode,
    levels: Mapping[Type[Method], Sequence[Level]],
    regions: Optional[RegionSizes] = None,
) -> nn.Module:
    """The chosen method, or the `Sum` of those chosen, over the levels of each."""
    methods = [method.from_pair(cfg, own, regions) for method, own in levels.items()]
    return methods[0] if len(methods) == 1 else Sum(methods)
