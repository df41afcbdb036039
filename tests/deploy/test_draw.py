"""Boxes land on the right pixels in their class's colour; small and odd images stay readable."""

import numpy as np
import pytest

from deploy.serving.draw import class_colour, draw_detections

CLASSES = ["circle", "square", "a class with a rather long name, longer than the picture is wide"]


def grey(height, width):
    return np.full((height, width, 3), 90, np.uint8)


def test_edges_have_the_class_colour_and_the_inside_is_untouched():
    image = grey(500, 600)
    picture = np.asarray(draw_detections(image, [[100, 200, 300, 400]], [1], CLASSES, [0.9]))
    colour = class_colour(1)
    assert picture.shape == (500, 600, 3)
    for y, x in [(200, 250), (400, 250), (300, 100), (300, 300)]:
        assert tuple(picture[y, x]) == colour
    assert (picture[210:390, 110:290] == 90).all()
    assert (image == 90).all()


def test_small_images_are_enlarged_by_a_whole_factor():
    picture = draw_detections(grey(96, 64), [[0, 0, 64, 96]], [0], CLASSES)
    assert picture.size == (64 * 5, 96 * 5)
    pixels = np.asarray(picture)
    assert tuple(pixels[300, 319]) == tuple(pixels[479, 200]) == class_colour(0)


def test_bgr_becomes_rgb():
    blue = np.zeros((500, 500, 3), np.uint8)
    blue[:, :, 0] = 255
    picture = draw_detections(blue, np.zeros((0, 4)), [], CLASSES, [])
    assert picture.mode == "RGB" and picture.getpixel((250, 250)) == (0, 0, 255)


def test_masks_are_half_their_class_colour():
    image, mask = grey(500, 600), np.zeros((500, 600), bool)
    mask[210:300, 110:200] = True
    boxes, labels = [[100, 200, 300, 400]], [1]
    picture = np.asarray(draw_detections(image, boxes, labels, CLASSES, [0.9], iter([mask])))
    assert tuple(picture[250, 150]) == tuple((90 + value) // 2 for value in class_colour(1))
    assert (picture[350, 150:280] == 90).all() and (image == 90).all()


def test_best_score_is_drawn_last():
    boxes, scores = [[100, 100, 200, 200]] * 2, [0.9, 0.3]
    for labels in ([0, 1], [1, 0]):
        picture = draw_detections(grey(500, 500), boxes, labels, CLASSES, scores)
        assert picture.getpixel((100, 150)) == class_colour(labels[0])


@pytest.mark.parametrize(
    "box", [[0, 0, 500, 500], [-50, -50, 20, 9], [499, 499, 500, 500], [480, 0, 900, 900]]
)
@pytest.mark.parametrize("label", [0, 2])
def test_boxes_at_and_beyond_the_border_are_drawn(box, label):
    picture = draw_detections(grey(500, 500), [box], [label], CLASSES, [0.5])
    drawn = (np.asarray(picture) == class_colour(label)).all(axis=2)
    assert picture.size == (500, 500) and drawn.sum() > 100


def test_colours_differ_between_classes():
    colours = np.array([class_colour(label) for label in range(12)], float)
    distance = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(12)
    assert distance.min() > 60


def test_names_of_any_text_are_drawn_on_one_line():
    hostile = "a\n\n\x1b[2J\udcff <b>$\\frac{$" + "x" * 10_000
    shown = "a \\x1b[2J\\xff <b>$\\frac{$" + "x" * 10_000
    both = [
        np.asarray(draw_detections(grey(500, 500), [[9, 99, 80, 200]], [0], [name], [0.5]))
        for name in (hostile, shown[:57] + "...")
    ]
    np.testing.assert_array_equal(*both)
