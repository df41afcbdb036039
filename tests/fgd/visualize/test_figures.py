import json

import numpy as np
import torch

from fgd.visualize import LevelMaps, attention_figure, loss_figure, read_metrics


def test_every_array_lies_over_the_padded_image():
    rng = np.random.default_rng(0)
    maps = {
        name: LevelMaps(*(rng.random(shape) for _ in range(4)), (64, 96))
        for name, shape in {"p3": (8, 12), "p4": (4, 6)}.items()
    }
    image = np.full((60, 90, 3), 7, np.uint8)
    figure = attention_figure(image, torch.tensor([[1.0, 2, 30, 40]]), maps, "detections")
    axes = np.array(figure.axes).reshape(2, 6)
    titles = [axis.get_title() for axis in axes[0]]
    assert titles[0] == "detections" and titles[-1] == "student - teacher"
    for row, own in zip(axes, maps.values()):
        assert len(row[0].images) == 1
        for axis, array in zip(row[1:], (*own[:4], own.difference)):
            under, over = axis.images
            assert under.get_extent() == [0, 90, 60, 0] and (under.get_array() == 7).all()
            assert over.get_extent() == [0, 96, 64, 0]
            assert (over.get_array() == array).all()
            assert list(axis.lines[0].get_xdata()) == [1, 30, 30, 1, 1]
        assert row[3].images[1].get_clim() == row[4].images[1].get_clim()


def test_an_image_without_boxes():
    maps = {"p3": LevelMaps(*np.zeros((4, 2, 3)), (16, 24))}
    figure = attention_figure(np.zeros((16, 24, 3), np.uint8), torch.zeros(0, 4), maps)
    assert not any(axis.lines for axis in figure.axes)


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
