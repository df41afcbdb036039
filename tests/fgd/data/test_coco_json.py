import json
import math

import pytest

from fgd.data.coco_json import bad_box, summarize
from fgd.errors import UserError

from .coco_files import coco_dict, write_coco


def check(folder, coco):
    path = write_coco(folder, coco)
    return summarize(path, str(folder / "images"))


@pytest.mark.parametrize(
    "box, reason",
    [
        ((4, 6, 20, 10), None),
        ((-5, -5, 20, 10), None),  # partly outside
        ((63.5, 47.5, 20, 10), None),
        ((0, 0, 64, 48), None),
        ((4, 6, 0, 10), "zero area"),
        ((4, 6, 20, 0), "zero area"),
        ((24, 6, -20, 10), "inverted"),
        ((4, 6, 20, -1), "inverted"),
        ((64, 6, 20, 10), "outside"),
        ((4, 48, 20, 10), "outside"),
        ((-20, 6, 20, 10), "outside"),
        ((4, -10, 20, 10), "outside"),
        ((math.nan, 6, 20, 10), "not finite"),
        ((4, 6, math.inf, 10), "not finite"),
    ],
    ids=str,
)
def test_bad_box_in_a_64x48_image(box, reason):
    assert bad_box(box, height=48, width=64) == reason


def test_summary_of_a_good_file(tmp_path):
    summary = check(tmp_path, coco_dict(images=5))
    assert (summary.images, summary.boxes, summary.dropped) == (5, 5, [])
    assert (summary.class_names, summary.category_ids) == (["cat", "dog"], [1, 2])
    assert summary.complete and summary.dropped_text() == ""


def test_categories_come_in_the_order_of_their_ids(tmp_path):
    summary = check(tmp_path, coco_dict(classes=("zebra", "ant", "bee"), category_ids=(90, 7, 40)))
    assert summary.category_ids == [7, 40, 90]
    assert summary.class_names == ["ant", "bee", "zebra"]


def test_unusable_boxes_are_counted_by_reason(tmp_path):
    coco = coco_dict(images=6)
    for entry, box in zip(
        coco["annotations"],
        ([1, 1, 0, 5], [1, 1, 3, 0], [9, 9, -3, 3], [64, 0, 2, 2]),
        strict=False,
    ):
        entry["bbox"] = box
    coco["annotations"][4]["image_id"] = 999
    summary = check(tmp_path, coco)
    assert summary.boxes == 1 and not summary.complete
    assert summary.dropped_text() == (
        "5 boxes dropped (2 zero area, 1 inverted, 1 outside, 1 of an absent image)"
    )
    assert summary.dropped[3] == {"annotation": 103, "image": 40, "reason": "outside"}


@pytest.mark.parametrize("key", ["iscrowd", "area"])
def test_missing_evaluation_keys_are_noticed(tmp_path, key):
    coco = coco_dict()
    del coco["annotations"][1][key]
    assert check(tmp_path, coco).complete is False


def test_images_without_annotations_are_fine(tmp_path):
    coco = coco_dict(images=4)
    del coco["annotations"][1:]
    summary = check(tmp_path, coco)
    assert (summary.images, summary.boxes) == (4, 1)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty (0 bytes)"),
        ("<html>", "is not JSON"),
        ("[1, 2]", "no list 'images'"),
        ("{}", "no list 'images'"),
        ('{"images": [{}], "annotations": [{}]}', "no list 'categories'"),
        ('{"images": {}, "annotations": [], "categories": []}', "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "list 'images' is empty"),
    ],
    ids=str,
)
def test_what_is_not_coco_format_is_refused_with_its_path(tmp_path, text, said):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        summarize(str(path), str(tmp_path))
    assert said in str(caught.value) and str(path) in str(caught.value)


def edit(key, **change):
    """An edit of the first entry of a list; None deletes the key."""

    def apply(coco):
        for name, value in change.items():
            if value is None:
                del coco[key][0][name]
            else:
                coco[key][0][name] = value

    return apply


@pytest.mark.parametrize(
    "fault, said",
    [
        (edit("images", file_name=None), "images[0] has no 'file_name'"),
        (edit("images", height=None), "images[0] has no 'height'"),
        (edit("images", id=20), "id 20 occurs twice in 'images'"),
        (edit("images", file_name="gone.png"), "image 'gone.png'"),
        (edit("images", height="48"), "image 10 has height, width ('48', 64)"),
        (edit("images", width=0), "image 10 has height, width (48, 0)"),
        (edit("categories", name=None), "categories[0] has no 'name'"),
        (edit("annotations", bbox=None), "annotations[0] has no 'bbox'"),
        (edit("annotations", id=101), "id 101 occurs twice in 'annotations'"),
        (edit("annotations", category_id=3), "annotation 100 has category_id 3"),
        (edit("annotations", bbox=[1, 2, 3]), "annotation 100 has bbox [1, 2, 3]"),
        (edit("annotations", bbox=[]), "annotation 100 has bbox []"),
        (edit("annotations", bbox=[1, 2, "3", 4]), "annotation 100 has bbox [1, 2, '3', 4]"),
    ],
)
def test_faulty_entries_are_named(tmp_path, fault, said):
    coco = coco_dict()
    write_coco(tmp_path, coco)
    fault(coco)
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(UserError) as caught:
        summarize(str(path), str(tmp_path / "images"))
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_no_usable_box_and_missing_paths_are_refused(tmp_path):
    coco = coco_dict(images=1)
    coco["annotations"][0]["bbox"] = [1, 1, 0, 0]
    with pytest.raises(UserError, match=r"no usable box; 1 boxes dropped \(1 zero area\)"):
        check(tmp_path, coco)
    with pytest.raises(UserError, match="gone.json does not exist"):
        summarize(str(tmp_path / "gone.json"), str(tmp_path))
    path = write_coco(tmp_path, coco_dict())
    with pytest.raises(UserError, match="image folder .*nowhere.* does not exist"):
        summarize(path, str(tmp_path / "nowhere"))
