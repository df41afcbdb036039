"""Figures: masks and attention over an image, and losses over the iterations."""

import json
from pathlib import Path
from typing import Dict, List, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .maps import LevelMaps

_COLUMNS = ("foreground", "background", "teacher", "student", "student - teacher")


def attention_figure(
    image: np.ndarray, boxes: Tensor, maps: Mapping[str, LevelMaps], title: str = "ground truth"
) -> Figure:
    """One row per level: the image with boxes, then over it each mask, attention, and difference.

    Both attentions of a level have one scale, so that they can be compared by eye.

    Args:
        image: (H, W, 3) uint8 RGB, the network's input. boxes: (R, 4) XYXY in its pixels.
        title: of the first column: whose boxes they are.
    """
    titles = (title, *_COLUMNS)
    figure = Figure(figsize=(2 * len(titles), 2.1 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), len(titles), squeeze=False)
    for row, (level, arrays) in zip(axes, maps.items()):
        top = max(arrays.teacher_attention.max(), arrays.student_attention.max())
        bound = max(abs(arrays.difference).max(), 1e-6)
        overlays = (
            (arrays.foreground, {"vmin": 0}),
            (arrays.background, {"vmin": 0}),
            (arrays.teacher_attention, {"vmin": 0, "vmax": top}),
            (arrays.student_attention, {"vmin": 0, "vmax": top}),
            (arrays.difference, {"cmap": "coolwarm", "vmin": -bound, "vmax": bound}),
        )
        for axis in row:
            _draw_image(axis, image, boxes, arrays.padded_size)
        for axis, (array, scale) in zip(row[1:], overlays):
            height, width = arrays.padded_size
            axis.imshow(array, extent=(0, width, height, 0), alpha=0.7, **scale)
        row[0].set_ylabel(level)
    for axis, text in zip(axes[0], titles):
        axis.set_title(text, fontsize=9)
    return figure


def rgb_pixels(image: Tensor, image_format: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a network's (3, H, W) input, whose channels are "RGB" or "BGR"."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def _draw_image(axis: Axes, image: np.ndarray, boxes: Tensor, padded_size: Sequence[int]) -> None:
    """The image in grey with its boxes; what the batch was padded with stays white."""
    height, width = image.shape[:2]
    axis.imshow(image.mean(axis=2), extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=255)
    for x1, y1, x2, y2 in boxes.tolist():
        axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="lime", linewidth=0.7, zorder=3)
    axis.set(xlim=(0, padded_size[1]), ylim=(padded_size[0], 0), xticks=[], yticks=[])


def read_metrics(path: Path) -> List[dict]:
    """The lines of a metrics.json; a last line that was cut off by a stop is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def loss_figure(runs: Mapping[str, Path], prefixes: Sequence[str] = ("loss_",)) -> Figure:
    """Every loss whose name starts with one of ``prefixes`` over the iterations, run by run.

    Args:
        runs: label → metrics.json.
    """
    curves: Dict[str, Dict[str, List[tuple]]] = {}
    for label, path in runs.items():
        for line in read_metrics(path):
            for name, value in line.items():
                if name.startswith(tuple(prefixes)) and "iteration" in line:
                    points = curves.setdefault(name, {}).setdefault(label, [])
                    points.append((line["iteration"], value))
    columns = min(3, max(1, len(curves)))
    rows = max(1, -(-len(curves) // columns))
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    colours = {label: f"C{i}" for i, label in enumerate(runs)}
    for axis, (name, by_run) in zip(axes, sorted(curves.items())):
        for label, points in by_run.items():
            axis.plot(*zip(*points), label=label, color=colours[label], linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_yscale("log")
        axis.legend(fontsize=7)
    for axis in axes[len(curves) :]:
        axis.remove()
    return figure
