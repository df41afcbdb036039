"""The arrays behind the pictures: a method's own, of a batch that it is called with."""

from typing import Dict, Tuple

import torch

from ..distillation.distiller import Distiller
from ..errors import UserError
from ..methods.batch import Batch
from ..methods.method import Picture

Pictures = Dict[str, Dict[str, Picture]]  # level → caption → array


class PictureRecorder:
    """While entered, keeps the method's pictures of what it is called with.

    It looks on and changes nothing: not the loss, no random number.

    Args:
        distiller: UserError if it has no method. image: index in the batch.
    """

    def __init__(self, distiller: Distiller, image: int = 0):
        if distiller.distillation is None:
            raise UserError("distillation is off, so there is nothing to draw")
        self.distiller, self.image = distiller, image
        self.pictures: Pictures = {}
        self.padded_size: Tuple[int, int] = (0, 0)  # (height, width) in pixels that they lie over
        self.boxes = torch.zeros(0, 4)  # (R, 4) XYXY in pixels of the image

    def __enter__(self) -> "PictureRecorder":
        self.distiller.watch = self.take
        return self

    def __exit__(self, *exception) -> None:
        self.distiller.watch = None

    def take(self, batch: Batch) -> None:
        self.pictures = self.distiller.distillation.pictures(batch, self.image)
        self.padded_size, self.boxes = batch.padded_size, batch.boxes[self.image].cpu()


@torch.no_grad()
def record_pictures(distiller: Distiller, inputs: dict) -> PictureRecorder:
    """What the method sees of one mapped dataset dict with instances.

    The student is in eval mode: a trained one is what is looked at.

    Raises:
        UserError: the distiller has no method.
    """
    training = distiller.training
    distiller.eval()
    try:
        recorder = PictureRecorder(distiller)
        recorder.take(distiller.batch(distiller.read_student([inputs]), [inputs]))
    finally:
        distiller.train(training)
    return recorder
