"""SOLVER.EMA_DECAY: the moving average of a student, beside the weights that are trained."""

from contextlib import contextmanager
from typing import Dict, Iterator, List

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a student's trained parameters and of batch norm's statistics.

    After iteration i = 0, 1, ... it moves by 1 - min(decay, (1 + i) / (10 + i)) towards the
    weights: the customary warm-up, without which a short run would end with an average of its
    start. The statistics are averaged alike, since those of the last weights would be another
    network's. Frozen weights and counters are the student's own. It costs as much memory as the
    student once more.

    Args:
        student: on its device.  decay: between 0 and 1.
    """

    def __init__(self, student: nn.Module, decay: float):
        self.decay = decay
        places: Dict[int, int] = {}
        self._own: List[Tensor] = []
        self._names: Dict[str, int] = {}  # a tensor may have several
        for name, value in student.state_dict(keep_vars=True).items():
            frozen = isinstance(value, nn.Parameter) and not value.requires_grad
            if frozen or not value.is_floating_point():
                continue
            if id(value) not in places:
                places[id(value)] = len(self._own)
                self._own.append(value)
            self._names[name] = places[id(value)]
        self._values = [value.detach().clone() for value in self._own]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the student's weights of now."""
        torch._foreach_copy_(self._values, self._own)

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights that an iteration, counted from 0, has ended with."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self._values, self._own, 1 - decay)

    def state_dict(self) -> Dict[str, Tensor]:
        """The averages, by the student's names."""
        return {name: self._values[place] for name, place in self._names.items()}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the student has the averages and this object the trained weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for own, value in zip(self._own, self._values, strict=True):
            kept = own.clone()
            own.copy_(value)
            value.copy_(kept)
