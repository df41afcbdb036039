"""The method's pictures of a training batch in TensorBoard, every so many iterations."""

from typing import List, Optional

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import compat
from ..config import META_ARCHITECTURE
from .figures import picture_figure, rgb_pixels
from .maps import PictureRecorder

NAME = "distillation maps"  # of the picture in TensorBoard


def picture_hooks(cfg: CfgNode) -> List[HookBase]:
    """The hook of MODEL.DISTILLER.PICTURE_PERIOD; none for a period of 0, and on other ranks."""
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE or not comm.is_main_process():
        return []
    period = cfg.MODEL.DISTILLER.PICTURE_PERIOD
    return [LogPictures(period, cfg.INPUT.FORMAT)] if period else []


class LogPictures(HookBase):
    """Draws what the loss of each ``period``-th step was called with, of the batch's first image.

    It looks on: no forward of its own, no random number, so training stays as it is bit by bit.
    Steps without distillation (a schedule's factor of 0) and methods without maps have none.

    Args:
        image_format: channel order of the batch, "BGR" or "RGB".
    """

    def __init__(self, period: int, image_format: str):
        self.period, self.image_format = period, image_format
        self._recorder: Optional[PictureRecorder] = None

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        model = compat.unwrap(self.trainer.model)
        self._recorder = PictureRecorder(model).__enter__()
        self._handle = model.register_forward_pre_hook(self._keep_image)

    def _keep_image(self, model: nn.Module, args: tuple) -> None:
        self._image: Tensor = args[0][0]["image"]

    def after_step(self) -> None:
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        recorder.__exit__()
        self._handle.remove()
        if recorder.pictures:
            image = rgb_pixels(self._image, self.image_format)
            drawn = recorder.boxes, recorder.pictures, recorder.padded_size
            figure = picture_figure(image, *drawn)
            self.trainer.storage.put_image(NAME, rendered(figure))


def rendered(figure: Figure) -> np.ndarray:
    """(3, H, W) uint8 RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].transpose(2, 0, 1)
