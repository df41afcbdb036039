import json

import numpy as np
import torch

from fgd.methods.method import Picture
from fgd.visualize import loss_figure, picture_figure, read_metrics


def test_every_array_lies_over_the_padded_image():
    rng = np.random.default_rng(0)

    def pictures(*shape):
        return {
            "weight": Picture(rng.random(shape)),
            "teacher": Picture(rng.random(shape), "attention"),
            "student": Picture(2 * rng.random(shape), "attention"),
            "difference": Picture(rng.random(shape) - 0.5),
        }

    levels = {"p3": pictures(8, 12), "p4": pictures(4, 6)}
    image = np.full((60, 90, 3), 7, np.uint8)
    boxes = torch.tensor([[1.0, 2, 30, 40]])
    figure = picture_figure(image, boxes, levels, (64, 96), "detections")
    axes = np.array(figure.axes).reshape(2, 5)
    titles = [axis.get_title() for axis in axes[0]]
    assert titles == ["detections", *levels["p3"]]
    for row, own in zip(axes, levels.values()):
        assert len(row[0].images) == 1
        for axis, picture in zip(row[1:], own.values()):
            under, over = axis.images
            assert under.get_extent() == [0, 90, 60, 0] and (under.get_array() == 7).all()
            assert over.get_extent() == [0, 96, 64, 0]
            assert (over.get_array() == picture.values).all()
            assert list(axis.lines[0].get_xdata()) == [1, 30, 30, 1, 1]
        assert row[2].images[1].get_clim() == row[3].images[1].get_clim()
        assert row[3].images[1].get_clim()[1] == own["student"].values.max()
        assert row[1].images[1].get_clim() == (0, own["weight"].values.max())
        low, high = row[4].images[1].get_clim()
        assert low == -high and high == abs(own["difference"].values).max()


def test_an_image_without_boxes_and_levels_of_unlike_pictures():
    levels = {
        "p3": {"a": Picture(np.zeros((2, 3)))},
        "p4": {"b": Picture(np.ones((1, 2)))},
    }
    figure = picture_figure(np.zeros((16, 24, 3), np.uint8), torch.zeros(0, 4), levels, (16, 24))
    assert not any(axis.lines for axis in figure.axes)
    assert [len(axis.images) for axis in figure.axes] == [1, 2, 1, 1, 1, 2]


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
