"""Pictures of what the distillation loss sees, and of how training went."""

import json
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .attention import spatial_attention
from .distiller import Distiller
from .masks import cell_weights


class LevelMaps(NamedTuple):
    """Arrays (H, W) of one level and image, as `FGDLevelLoss` uses them."""

    foreground: np.ndarray
    background: np.ndarray
    teacher_attention: np.ndarray
    student_attention: np.ndarray


@torch.no_grad()
def level_maps(distiller: Distiller, inputs: dict) -> Dict[str, LevelMaps]:
    """Masks and attention of every distilled level for one mapped dataset dict with instances.

    The student runs in eval mode (a trained one is what is looked at); align convolutions apply.
    """
    distiller.eval()
    student = distiller.student
    images = student.preprocess_image([inputs])
    padded_size = tuple(images.tensor.shape[-2:])
    features = student.backbone(images.tensor)
    teacher_features = distiller.teacher.features([inputs], padded_size)
    boxes = [inputs["instances"].gt_boxes.tensor.to(distiller.device)]
    method = distiller.distillation
    size = padded_size if method.mask_reference == "padded" else tuple(inputs["image"].shape[-2:])
    maps = {}
    for name, loss in method.levels.items():
        own, teacher = features[name], teacher_features[name]
        own = own if loss.align is None else loss.align(own)
        masks = cell_weights(boxes, own.shape[-2:], [size])
        attention = [spatial_attention(f, loss.temperature) for f in (teacher, own)]
        maps[name] = LevelMaps(*(m[0].cpu().numpy() for m in (*masks, *attention)))
    return maps


def attention_figure(image: np.ndarray, boxes: Tensor, maps: Mapping[str, LevelMaps]) -> Figure:
    """One row per level: the image with its boxes, masks, both attentions and their difference.

    Args:
        image: (H, W, 3) uint8 RGB, the network's input. boxes: (R, 4) XYXY in its pixels.
    """
    titles = ("ground truth", "foreground", "background", "teacher", "student", "student - teacher")
    figure = Figure(figsize=(2 * len(titles), 2.1 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), len(titles), squeeze=False)
    for row, (level, arrays) in zip(axes, maps.items()):
        row[0].imshow(image)
        for x1, y1, x2, y2 in boxes.tolist():
            row[0].plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="lime", linewidth=1)
        row[0].set_ylabel(level)
        for axis, mask in zip(row[1:3], arrays[:2]):
            axis.imshow(mask, vmin=0)
        # One scale for both attentions, so that they can be compared by eye.
        top = max(a.max() for a in arrays[2:])
        for axis, attention in zip(row[3:5], arrays[2:]):
            axis.imshow(attention, vmin=0, vmax=top)
        difference = arrays.student_attention - arrays.teacher_attention
        bound = max(abs(difference).max(), 1e-6)
        row[5].imshow(difference, cmap="coolwarm", vmin=-bound, vmax=bound)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


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
