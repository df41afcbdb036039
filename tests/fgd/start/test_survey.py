"""Input size, canvas and levels from the boxes, and what is said of a dataset."""

import json

import numpy as np
import pytest

from fgd.start.survey import input_size, levels, lines, take, without
from fgd_inputs.coco import read_coco

from .drawn import surveyed, write_set


def sized(tmp_path, sizes, side, count=4):
    """Input size of images with one box of this side each."""
    boxes = [[(0, 0, 0, side, side)]] * len(sizes)
    return input_size(surveyed(tmp_path, sizes=sizes, boxes=boxes))


@pytest.mark.parametrize(
    "sizes, side, short, long, shape, canvas",
    [
        # 20 of 40 pixels are half of 480
        ([(640, 480)] * 3, 40, 240, 320, "landscape", (256, 320)),
        ([(480, 640)] * 3, 40, 240, 320, "portrait", (320, 256)),
        ([(480, 640), (640, 480)], 40, 240, 320, "mixed", (320, 320)),
        ([(640, 480)] * 3, 200, 224, 304, "landscape", (224, 320)),  # no fewer than 224
        ([(96, 96)] * 3, 50, 96, 96, "landscape", (96, 96)),  # nor more than there are
        ([(1600, 1200)] * 2, 6, 800, 1072, "landscape", (800, 1088)),  # nor more than 800
        ([(600, 100)] * 2, 30, 96, 192, "landscape", (96, 192)),  # a panorama shrinks
        ([(10, 9)] * 2, 5, 16, 32, "landscape", (32, 32)),
    ],
)
def test_input_size(sizes, side, short, long, shape, canvas, tmp_path):
    found = sized(tmp_path, sizes, side)
    assert (found.short, found.long, found.shape, found.canvas) == (short, long, shape, canvas)
    expected = np.minimum(short / np.min(sizes, 1), long / np.max(sizes, 1))
    np.testing.assert_allclose(found.scales(np.array(sizes)[:, ::-1]), expected)


def test_the_smallest_class_decides(tmp_path):
    """Its median side is 30 of 480 pixels, whatever the many boxes of the other one are."""
    boxes = [[(0, 0, 0, 200, 200)] * 3 + [(1, 0, 0, 30, 30)]] * 2
    found = input_size(surveyed(tmp_path, sizes=[(480, 480)] * 2, boxes=boxes))
    assert found.short == 320 and found.smallest == ("b", 20.0)


@pytest.mark.parametrize(
    "sides, two_stage, strides, top",
    [
        ([20, 60], False, [8, 16, 32], "none"),
        ([8, 30], False, [4, 8, 16], "none"),
        ([8, 8, 250], False, [4, 8, 16, 32], "none"),
        ([20, 400], False, [8, 16, 32, 64, 128], "p6p7"),
        ([20, 400], True, [8, 16, 32], "none"),
    ],
)
def test_levels(sides, two_stage, strides, top):
    found = levels(np.array(sides, float), two_stage)
    assert (found.strides, found.top_block) == (strides, top)
    assert found.names == [f"p{int(np.log2(x))}" for x in strides]
    assert found.stages == [f"res{int(np.log2(x))}" for x in strides if x <= 32]


def test_what_is_said(tmp_path):
    boxes = [[(0, 0, 0, 20, 20), (1, 9, 9, 40, 40)], [], [(0, 0, 0, 50, 50)], [(0, 5, 5, 0, 9)]]
    path = write_set(
        tmp_path,
        sizes=[(64, 64), (64, 64), (48, 64), (64, 64)],
        boxes=boxes,
        classes=["a\nb", "c", "d"],
    )
    content = json.loads(path.read_text())
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    assert lines(take(read_coco(str(path))), ["image x is damaged"]) == [
        "4 images, 3 boxes, 1 of them crowd regions",
        "classes, with boxes: a b 2, c 0, d 0",
        "sizes: 3 of 4 images are 64x64, 2 sizes in all; 1 are portrait",
        "boxes per image: 0 to 1, median 0.5; 2 images without any, which are not trained on",
        "small objects (below 32x32 pixels): 1 of 2, 50.0%",
        "fault: 1 boxes dropped (1 zero area)",
        "fault: classes without a box: c, d",
        "fault: 1 images cannot be used and are left out; the first: image x is damaged",
    ]


def test_images_that_are_left_out_take_their_boxes_along(tmp_path):
    boxes = [[(0, i, 0, 20, 20)] * (i + 1) for i in range(4)]
    survey = surveyed(tmp_path / "a", sizes=[(64, 64)] * 4, boxes=boxes)
    part = survey.of_images(np.array([1, 3]))
    assert part.per_image.tolist() == [2, 4] and part.boxes[:, 0].tolist() == [1] * 2 + [3] * 4
    rest = take(without(survey.found, [0, 2]))
    assert rest.per_image.tolist() == [2, 4] and rest.owners.tolist() == part.owners.tolist()
