"""Boxes that look like corners or shares of the image are said to, with figures; others are not."""

import numpy as np
import pytest

from fgd_inputs.coco import read_coco

from .coco_files import coco_dict, write_coco


def drawn(count=20, seed=0):
    """x, y, w, h of boxes all over a 64x48 image."""
    generator = np.random.default_rng(seed)
    left = generator.uniform(2, 40, count)
    top = generator.uniform(2, 30, count)
    width = generator.uniform(4, 22, count).clip(max=63 - left)
    height = generator.uniform(4, 16, count).clip(max=47 - top)
    return np.stack([left, top, width, height], axis=1)


def corners(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def warnings(folder, boxes, polygons=None):
    coco = coco_dict(images=3)
    entry = coco["annotations"][0]
    coco["annotations"] = [
        {**entry, "id": i, "image_id": 10 + 10 * (i % 3), "bbox": list(map(float, box))}
        for i, box in enumerate(boxes)
    ]
    for entry, (x, y, w, h) in zip(coco["annotations"], () if polygons is None else polygons):
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return read_coco(write_coco(folder, coco)).warnings


@pytest.mark.parametrize("seed", range(5))
def test_good_boxes_raise_no_suspicion(seed, tmp_path):
    boxes = drawn(seed=seed)
    assert warnings(tmp_path, boxes) == warnings(tmp_path, boxes, boxes) == []


def test_corners_are_told_by_their_images(tmp_path):
    (text,) = warnings(tmp_path, corners(drawn()))
    assert text.endswith("COCO has x, y, width, height") and "of 20 boxes reach beyond" in text
    assert "20 lie inside it as corners" in text


def test_corners_are_told_by_their_polygons(tmp_path):
    boxes = drawn()
    boxes[:, :2] = boxes[:, :2] / 4 + 3  # none reaches beyond the image
    boxes[:, 2:] /= 2
    (text,) = warnings(tmp_path, corners(boxes), boxes)
    assert "20 of 20 boxes are the corners x1, y1, x2, y2 of their own polygons" in text


def test_shares_of_the_image_are_told(tmp_path):
    boxes = drawn() / [64, 48, 64, 48]
    (text,) = warnings(tmp_path, boxes)
    assert text.startswith("20 of 20 boxes lie within the first pixel")


def test_few_boxes_say_nothing(tmp_path):
    assert warnings(tmp_path, corners(drawn(4))) == []
    boxes = drawn()
    boxes[0] = [50, 40, 40, 40]  # one box beyond its image is common
    assert warnings(tmp_path, boxes) == []


@pytest.mark.parametrize(
    "crowds, told", [(0, False), (4, False), (5, True), (19, True), (20, False)]
)
def test_many_crowd_regions_are_told(crowds, told, tmp_path):
    """As CVAT marks painted masks; if all are, evaluation and training refuse them."""
    coco = coco_dict(images=20)
    for entry in coco["annotations"][:crowds]:
        entry["iscrowd"] = 1
    found = read_coco(write_coco(tmp_path, coco)).warnings
    text = f"{crowds} of 20 boxes are crowd regions (iscrowd 1), which are neither trained on nor"
    assert [x.startswith(text) for x in found] == [True] * (4 < crowds < 20)
