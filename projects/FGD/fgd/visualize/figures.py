"""Figures: a method's pictures over an image, and losses over the iterations."""

import json
from pathlib import Path
from typing import Dict, Iterable, List, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fgd_inputs.names import figure_text

from ..methods.method import Picture
from .maps import Pictures


def picture_figure(
    image: np.ndarray,
    boxes: Tensor,
    pictures: Pictures,
    padded_size: Sequence[int],
    title: str = "ground truth",
) -> Figure:
    """One row per level: the image with boxes, then over it each of the level's pictures.

    Pictures of a level in one group have one scale, so that they can be compared by eye; those
    with values on both sides of 0 have a scale that is symmetric.

    Args:
        image: (H, W, 3) uint8 RGB, the network's input. boxes: (R, 4) XYXY in its pixels.
        padded_size: (height, width) in pixels that the pictures lie over.
        title: of the first column: whose boxes they are.
    """
    captions = list(dict.fromkeys(name for level in pictures.values() for name in level))
    size = 2 * (1 + len(captions)), 2.1 * len(pictures)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(pictures), 1 + len(captions), squeeze=False)
    height, width = padded_size
    for row, (level, own) in zip(axes, pictures.items()):
        for axis in row:
            _draw_image(axis, image, boxes, padded_size)
        for axis, caption in zip(row[1:], captions):
            if caption in own:
                scale = _scale(own[caption], own.values())
                extent = (0, width, height, 0)
                axis.imshow(own[caption].values, extent=extent, alpha=0.7, **scale)
        row[0].set_ylabel(figure_text(level))
    for axis, text in zip(axes[0], (title, *captions)):
        axis.set_title(figure_text(text), fontsize=9)
    return figure


def _scale(picture: Picture, others: Iterable[Picture]) -> dict:
    """Colours of one picture, given all of its level."""
    group = [x for x in others if x is picture or picture.group and x.group == picture.group]
    bound = max([*(abs(x.values).max() for x in group), 1e-6])
    if min(x.values.min() for x in group) < 0:
        return {"cmap": "coolwarm", "vmin": -bound, "vmax": bound}
    return {"vmin": 0, "vmax": bound}


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
    """The lines of a metrics.json; from one on that was cut off by a stop they are left out."""
    lines: List[dict] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(found, dict):
            break
        lines.append(found)
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
            axis.plot(*zip(*points), label=figure_text(label), color=colours[label], linewidth=1)
        axis.set_title(figure_text(name), fontsize=9)
        axis.set_yscale("log")
        axis.legend(fontsize=7)
    for axis in axes[len(curves) :]:
        axis.remove()
    return figure
