import json

import numpy as np
import torch
from detectron2.modeling import build_model

from fgd.attention import spatial_attention
from fgd.distiller import Distiller
from fgd.features import Level
from fgd.losses import Weights
from fgd.masks import cell_weights
from fgd.methods import FGD
from fgd.teacher import FrozenTeacher
from fgd.visualize import attention_figure, level_maps, loss_figure, read_metrics


def make_distiller(tiny_cfg):
    student, teacher = build_model(tiny_cfg()), build_model(tiny_cfg(channels=24))
    levels = [Level("p3", 16, 24), Level("p4", 16, 24)]
    method = FGD(levels, Weights(1.0, 1.0, 1.0, 1.0), 0.5, "padded")
    return Distiller(
        student=student, teacher=FrozenTeacher(teacher, "BGR", "BGR"), distillation=method
    )


def test_arrays_are_those_of_the_loss(tiny_cfg, make_batch):
    distiller, inputs = make_distiller(tiny_cfg), make_batch([(60, 90)])[0]
    maps = level_maps(distiller, inputs)
    assert list(maps) == ["p3", "p4"]
    images = distiller.student.preprocess_image([inputs])
    size = tuple(images.tensor.shape[-2:])
    assert size == (64, 96)
    with torch.no_grad():
        own = distiller.student.backbone(images.tensor)["p3"]
        own = distiller.distillation.levels["p3"].align(own)
        other = distiller.teacher.features([inputs], size)["p3"]
    foreground, background = cell_weights([inputs["instances"].gt_boxes.tensor], (8, 12), [size])
    wanted = foreground, background, spatial_attention(other, 0.5), spatial_attention(own, 0.5)
    for array, tensor in zip(maps["p3"], wanted, strict=True):
        np.testing.assert_allclose(array, tensor[0].numpy(), rtol=1e-6)
    figure = attention_figure(
        np.zeros((60, 90, 3), np.uint8), torch.tensor([[1.0, 2, 30, 40]]), maps
    )
    assert len(figure.axes) == 12


def test_loss_figure_and_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.json"
    losses = {f"loss_{x}": 1.0 for x in "bcd"}
    lines = [{"iteration": i, "loss_a": 2.0 / (i + 1), **losses, "lr": 0.1} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 3, "lo')
    assert read_metrics(path) == lines
    figure = loss_figure({"one": path, "two": path})
    titles = sorted(axis.get_title() for axis in figure.axes)
    assert titles == ["loss_a", "loss_b", "loss_c", "loss_d"]  # two rows of three, no empty axis
    assert list(figure.axes[0].lines[0].get_ydata()) == [2.0, 1.0, 2 / 3]
    assert [line.get_color() for line in figure.axes[0].lines] == ["C0", "C1"]
