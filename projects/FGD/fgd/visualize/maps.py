"""The arrays behind the pictures, taken from calls of the loss itself."""

from functools import partial
from typing import Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..distillation.distiller import Distiller
from ..distillation.methods import FGD
from ..errors import UserError
from ..loss.attention import spatial_attention
from ..loss.sweep import small_dtype


class LevelMaps(NamedTuple):
    """Arrays (H, W) of one level and image, as `FGDLevelLoss` used them."""

    foreground: np.ndarray
    background: np.ndarray
    teacher_attention: np.ndarray
    student_attention: np.ndarray
    padded_size: Tuple[int, int]  # (height, width) in pixels that the maps lie over

    @property
    def difference(self) -> np.ndarray:
        """Student minus teacher: what the attention term pulls to 0."""
        return self.student_attention - self.teacher_attention


class MapRecorder:
    """While entered, keeps `LevelMaps` of what an FGD loss is called with.

    It reads the arguments of each level's loss and changes nothing. The fused loss makes the
    attention inside its sweep over the maps, so that is computed again, by its definition.

    Args:
        method: UserError if it is another than FGD. image: index in the batch.
    """

    def __init__(self, method: Optional[nn.Module], image: int = 0):
        if not isinstance(method, FGD):
            name = type(method).__name__ if method is not None else "off"
            raise UserError(f"there are pictures of FGD's maps only; distillation is {name}")
        self.method, self.image = method, image
        self.maps: Dict[str, LevelMaps] = {}
        self.boxes = torch.zeros(0, 4)  # (R, 4) XYXY in pixels of the image
        self._handles: list = []

    def __enter__(self) -> "MapRecorder":
        self._handles = [self.method.register_forward_pre_hook(self._begin)]
        for name, loss in self.method.levels.items():
            self._handles.append(loss.register_forward_hook(partial(self._take, name)))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, method: nn.Module, args: tuple) -> None:
        _, _, boxes, _, self._padded_size = args
        self.maps, self.boxes = {}, boxes[self.image].cpu()

    @torch.no_grad()
    def _take(self, name: str, loss: nn.Module, args: tuple, output: dict) -> None:
        own, teacher, *masks = (x[self.image : self.image + 1] for x in args)
        with torch.autocast(own.device.type, enabled=False):
            dtype = small_dtype(own, teacher)
            own = own.to(dtype) if loss.align is None else loss.align(own.to(dtype))
            attention = (_attention(x.to(dtype), loss) for x in (teacher, own))
            arrays = [x[0].cpu().numpy() for x in (*masks, *attention)]
        self.maps[name] = LevelMaps(*arrays, self._padded_size)


def _attention(features: Tensor, loss: nn.Module) -> Tensor:
    return spatial_attention(features, loss.temperature)


@torch.no_grad()
def level_maps(distiller: Distiller, inputs: dict) -> Dict[str, LevelMaps]:
    """Masks and attention of every distilled level for one mapped dataset dict with instances.

    The loss is computed with the student in eval mode: a trained one is what is looked at.

    Raises:
        UserError: the distiller has no FGD loss.
    """
    training = distiller.training
    distiller.eval()
    try:
        with MapRecorder(distiller.distillation) as recorder:
            features, padded_size = distiller.read_student([inputs])
            distiller.terms(features, [inputs], padded_size)
    finally:
        distiller.train(training)
    return recorder.maps
