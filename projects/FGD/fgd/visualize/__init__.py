"""Pictures of what the distillation loss sees, and of how training went."""

from .figures import loss_figure, picture_figure, read_metrics, rgb_pixels
from .maps import PictureRecorder, record_pictures

__all__ = [
    "PictureRecorder",
    "loss_figure",
    "picture_figure",
    "read_metrics",
    "record_pictures",
    "rgb_pixels",
]
