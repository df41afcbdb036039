"""Pictures of what the distillation loss sees, and of how training went."""

from .figures import attention_figure, loss_figure, read_metrics, rgb_pixels
from .maps import LevelMaps, MapRecorder, level_maps

__all__ = [
    "LevelMaps",
    "MapRecorder",
    "attention_figure",
    "level_maps",
    "loss_figure",
    "read_metrics",
    "rgb_pixels",
]
