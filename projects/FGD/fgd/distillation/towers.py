"""A dense head, RetinaNet's or FCOS', step by step on one level, as far as it is asked for."""

from functools import cache, cached_property
from typing import Any, Callable, Collection, ContextManager, List, Mapping, Optional, Tuple

import torch
from detectron2.layers.batch_norm import CycleBatchNormList
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from torch import Tensor, nn

from ..methods.batch import Cut

TOWERS = ("cls_subnet", "bbox_subnet")


class OnDemand(Mapping):
    """A mapping over given keys whose values are made when first asked for."""

    def __init__(self, keys: Collection, make: Callable[[Any], Any]):
        self._keys, self._make = keys, cache(make)

    def __getitem__(self, key):
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self):
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


# A tower is read as steps: a convolution with its norm, a ReLU, a convolution, and so on. A place
# in it is the number of steps before it.


def steps_of(tower: nn.Sequential) -> List[List[nn.Module]]:
    """The modules of each step, [] for a tower of another form."""
    steps: List[List[nn.Module]] = []
    for module in tower:
        if isinstance(module, (nn.Conv2d, nn.ReLU)):
            steps.append([module])
        elif steps and len(steps) % 2:
            steps[-1].append(module)  # a norm
        else:
            return []
    for convolution, activation in zip(steps[::2], steps[1::2]):
        # In place it would overwrite what a cut before it hands out.
        if type(convolution[0]) is nn.ReLU or type(activation[0]) is not nn.ReLU:
            return []
        if activation[0].inplace:
            return []
    return steps if len(steps) % 2 == 0 else []


def place_of(cut: Cut) -> int:
    return 2 * cut.conv - (cut.conv > 0 and not cut.activated)


class LevelRun:
    """A `HeadLevel` of a head on one level, each part of which is computed when it is asked for.

    Args:
        head: RetinaNetHead or FCOSHead. level: its index, which norms of each level go by.
        conv: after which of the towers' convolutions the maps are.
        mode: what to compute in. cuts: what of the towers may be asked for.
    """

    def __init__(
        self,
        head: nn.Module,
        level: int,
        conv: int,
        maps: Tuple[Tensor, Tensor],
        mode: Callable[[], ContextManager],
        cuts: Collection[Cut] = (),
    ):
        self._head, self._level, self._mode, self._cuts = head, level, mode, cuts
        self._kept = {tower: {2 * conv: x} for tower, x in zip(TOWERS, maps)}
        self._wanted = {place_of(cut) for cut in cuts}

    # Made anew each time: kept, it would be a cycle, and maps would wait for Python's collector.
    @property
    def class_maps(self) -> Mapping[Cut, Tensor]:
        return OnDemand(self._cuts, lambda cut: self._reach("cls_subnet", place_of(cut)))

    @property
    def box_maps(self) -> Mapping[Cut, Tensor]:
        return OnDemand(self._cuts, lambda cut: self._reach("bbox_subnet", place_of(cut)))

    @cached_property
    def logits(self) -> Tensor:
        return self._predict(self._head.cls_score, "cls_subnet")

    @cached_property
    def deltas(self) -> Tensor:
        return self._predict(self._head.bbox_pred, "bbox_subnet")

    @cached_property
    def centerness(self) -> Optional[Tensor]:
        predictor = getattr(self._head, "ctrness", None)
        return predictor and self._predict(predictor, "bbox_subnet")

    def _predict(self, predictor: nn.Module, tower: str) -> Tensor:
        end = len(steps_of(getattr(self._head, tower)))
        features = self._reach(tower, end)
        if tower == "bbox_subnet" and hasattr(self._head, "ctrness"):
            self._kept[tower][end] = features  # two predictors read it
        with self._mode():
            return predictor(features)

    def _reach(self, tower: str, place: int) -> Tensor:
        """The map at a place, from the nearest one that is there; keeps those of the cuts."""
        kept = self._kept[tower]
        start = max(k for k in kept if k <= place)
        x = kept[start]
        with self._mode():
            for k, step in enumerate(steps_of(getattr(self._head, tower))[start:place], start + 1):
                for module in step:
                    x = call_at(module, x, self._level)
                if k in self._wanted:
                    kept[k] = x
        return x


def call_at(module: nn.Module, x: Tensor, level: int) -> Tensor:
    """The output for a map of one level, also of norms that count their calls to know the level."""
    if not isinstance(module, CycleBatchNormList):
        return module(x)
    position, module._pos = module._pos, level
    try:
        return module(x)
    finally:
        module._pos = position


def decode(transform, anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes as ``transform.apply_deltas`` makes them, of many images and in float64 too.

    Args:
        transform: Box2BoxTransform, or FCOS' Box2BoxTransformLinear. anchors: (R, 4).
        deltas: (N, R, 4).
    """
    deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    left, top, right, bottom = anchors.to(deltas.dtype).unbind(dim=-1)
    width, height = right - left, bottom - top
    x, y = left + width / 2, top + height / 2
    if isinstance(transform, Box2BoxTransformLinear):
        unit = width[:, None] if transform.normalize_by_size else 1.0
        left, top, right, bottom = (deltas.relu() * unit).unbind(dim=-1)
        return torch.stack([x - left, y - top, x + right, y + bottom], dim=-1)
    # One by one: the weights as a tensor would make a GPU wait.
    dx, dy, dw, dh = (d / w for d, w in zip(deltas.unbind(dim=-1), transform.weights))
    x, y = x + dx * width, y + dy * height
    width, height = (
        size / 2 * d.clamp(max=transform.scale_clamp).exp()
        for size, d in ((width, dw), (height, dh))
    )
    return torch.stack([x - width, y - height, x + width, y + height], dim=-1)
