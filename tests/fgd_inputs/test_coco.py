"""What a COCO JSON is read as, field by field, and what is refused with file and entry."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from fgd_inputs.coco import read_coco, read_test_set
from fgd_inputs.coco_entries import bad_box
from fgd_inputs.coco_masks import decode_counts, polygon_area
from fgd_inputs.errors import UserError

from .coco_files import coco_dict, write_coco

POLYGON = [4.0, 6.0, 24.0, 6.0, 24.0, 16.0, 4.0, 16.0]  # the box of coco_dict


def read(folder, coco, **options):
    return read_coco(write_coco(folder, coco), **options)


@pytest.mark.parametrize(
    "box, reason",
    [
        ((4, 6, 20, 10), None),
        ((-5, -5, 20, 10), None),  # partly outside
        ((63.5, 47.5, 20, 10), None),
        ((0, 0, 64, 48), None),
        ((4, 6, 0, 10), "zero area"),
        ((4, 6, 20, 0), "zero area"),
        ((4, 6, 20, 1e-5), "zero area"),
        ((4, 6, 1e8, 10), "too large"),
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


def test_a_good_file(tmp_path):
    found = read(tmp_path, coco_dict(images=5))
    assert (len(found.images), len(found.annotations), found.dropped) == (5, 5, [])
    assert (found.class_names, found.category_ids) == (["cat", "dog"], [1, 2])
    assert (found.notes, found.warnings, found.dropped_text()) == ([], [], "")
    assert found.counted() == "5 images, 5 boxes"
    first = found.annotations[0]
    assert first == {
        "id": 1,
        "image_id": 10,
        "category_id": 1,
        "bbox": [4.0, 6.0, 20.0, 10.0],
        "area": 200.0,
        "iscrowd": 0,
    }
    assert found.images[1]["file"] == str(tmp_path / "images" / "1.png")


def test_images_and_categories_come_in_the_order_of_their_ids(tmp_path):
    coco = coco_dict(classes=("zebra", "ant", "bee"), category_ids=(90, 7, 40))
    coco["images"].reverse()
    found = read(tmp_path, coco)
    assert found.category_ids == [7, 40, 90] and found.class_names == ["ant", "bee", "zebra"]
    assert [image["id"] for image in found.images] == [10, 20, 30]


def test_unusable_boxes_are_counted_by_reason(tmp_path):
    coco = coco_dict(images=6)
    boxes = ([1, 1, 0, 5], [1, 1, 3, 0], [9, 9, -3, 3], [64, 0, 2, 2])
    for entry, box in zip(coco["annotations"], boxes, strict=False):
        entry["bbox"] = box
    coco["annotations"][4]["image_id"] = 999
    found = read(tmp_path, coco)
    assert found.dropped_text() == (
        "5 boxes dropped (2 zero area, 1 inverted, 1 outside, 1 of an absent image)"
    )
    assert found.dropped[3] == {"annotation": 103, "image": 40, "reason": "outside"}
    assert [(a["id"], a["image_id"]) for a in found.annotations] == [(1, 60)]


def test_images_without_annotations_are_fine(tmp_path):
    coco = coco_dict(images=4)
    del coco["annotations"][1:]
    found = read(tmp_path, coco)
    assert (len(found.images), len(found.annotations)) == (4, 1)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty (0 bytes)"),
        ("<html>", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ("[1, 2]", "no list 'images'"),
        ("{}", "no list 'images'"),
        ('{"images": [{}], "annotations": [{}]}', "no list 'categories'"),
        ('{"images": {}, "annotations": [], "categories": []}', "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "list 'images' is empty"),
        ('{"images": 1' + "0" * 5000 + "}", "is not JSON"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_not_coco_format_is_refused_with_its_path(tmp_path, text, said):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_coco(str(path))
    assert said in str(caught.value) and str(path) in str(caught.value)


DELETED = object()


def edited(coco, key, name, value):
    """The dict with one field of the first entry of a list changed."""
    if value is DELETED:
        del coco[key][0][name]
    else:
        coco[key][0][name] = value
    return coco


@pytest.mark.parametrize(
    "key, name, value, said",
    [
        ("images", "file_name", DELETED, "image 10 has no 'file_name'"),
        ("images", "file_name", ["0.png"], "image 10 has file_name ['0.png']"),
        ("images", "file_name", "", "image 10 has file_name ''"),
        ("images", "file_name", "a\0b", "image 10 has file_name 'a\\x00b'"),
        ("images", "height", DELETED, "image 10 has no 'height'"),
        ("images", "height", "48", "image 10 has height, width '48', 64"),
        ("images", "width", 0, "image 10 has height, width 48, 0"),
        ("images", "width", float("inf"), "image 10 has height, width 48, inf"),
        ("images", "width", 10**400, "image 10 has height, width 48, 1000"),
        ("images", "width", 64.5, "image 10 has height, width 48, 64.5"),
        ("images", "id", DELETED, "images[0] has no 'id'"),
        ("images", "id", 20, "id 20 occurs twice in 'images'"),
        ("images", "id", "10", "images[1] has id 20; expected whole numbers, or texts"),
        ("images", "id", [10], "images[0] has id [10]"),
        ("images", "id", None, "images[0] has id None"),
        ("images", "id", True, "images[0] has id True"),
        ("images", "id", 10.5, "images[0] has id 10.5"),
        ("categories", "name", DELETED, "category 1 has no 'name'"),
        ("categories", "name", "  ", "category 1 has name ' '"),
        ("categories", "name", ["x"], "category 1 has name ['x']"),
        ("categories", "name", "\ud800", "category 1 has name '\\ud800'; expected a text"),
        ("images", "id", "x\0", "images[0] has id 'x\\x00'"),
        ("categories", "name", "dog", "category 2 has the name 'dog', as category 1 has"),
        ("categories", "id", 2, "id 2 occurs twice in 'categories'"),
        ("annotations", "bbox", DELETED, "annotation 100 has no 'bbox'"),
        ("annotations", "bbox", [1, 2, 3], "annotation 100 has bbox [1, 2, 3]"),
        ("annotations", "bbox", [], "annotation 100 has bbox []"),
        ("annotations", "bbox", [1, 2, "3", 4], "annotation 100 has bbox [1, 2, '3', 4]"),
        ("annotations", "bbox", [1, 2, True, 4], "annotation 100 has bbox [1, 2, True, 4]"),
        ("annotations", "bbox", [1, 2, 10**400, 4], "annotation 100 has bbox [1, 2, 1000"),
        ("annotations", "category_id", 3, "annotation 100 has category_id 3, not in"),
        ("annotations", "category_id", [1], "annotation 100 has category_id [1]"),
        ("annotations", "image_id", {}, "annotation 100 has image_id {}"),
        ("annotations", "image_id", DELETED, "annotation 100 has no 'image_id'"),
        ("annotations", "iscrowd", "yes", "annotation 100 has iscrowd 'yes'; expected 0 or 1"),
        ("annotations", "iscrowd", 2, "annotation 100 has iscrowd 2"),
        ("annotations", "iscrowd", [0], "annotation 100 has iscrowd [0]"),
        ("annotations", "ignore", "maybe", "annotation 100 has ignore 'maybe'"),
    ],
)
def test_faulty_entries_are_named(tmp_path, key, name, value, said):
    coco = coco_dict()
    write_coco(tmp_path, coco)
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(edited(coco, key, name, value)))
    with pytest.raises(UserError) as caught:
        read_coco(str(path))
    text = str(caught.value)
    assert said in text and str(path) in text and "\n" not in text and len(text) < 400


@pytest.mark.parametrize("key", ["images", "categories", "annotations"])
def test_entries_that_are_no_objects_are_named_by_place(tmp_path, key):
    coco = coco_dict()
    path = write_coco(tmp_path, coco)
    coco[key].insert(1, 5)
    (tmp_path / "labels.json").write_text(json.dumps(coco))
    with pytest.raises(UserError, match=rf"{key}\[1\] is 5; expected an object"):
        read_coco(path)


@pytest.mark.parametrize("value", [0, 1, None, "0", "1", "", False, True, 0.0, 1.0, DELETED])
def test_crowd_flags_are_read(tmp_path, value):
    crowd = value in (1, "1")
    found = read(tmp_path, edited(coco_dict(), "annotations", "iscrowd", value))
    assert [a["iscrowd"] for a in found.annotations] == [int(crowd), 0, 0]
    assert ("1 of them crowd regions" in found.counted()) == crowd


def test_ignored_boxes_are_crowd_regions(tmp_path):
    found = read(tmp_path, edited(coco_dict(), "annotations", "ignore", 1))
    assert found.crowds == 1
    assert found.notes == ["1 boxes marked ignore are read as crowd regions (iscrowd 1)"]


def test_all_crowd_and_no_box_leave_nothing_to_do(tmp_path):
    coco = coco_dict(images=2)
    for entry in coco["annotations"]:
        entry["iscrowd"] = 1
    found = read(tmp_path, coco)
    with pytest.raises(UserError, match="labels.json: all 2 boxes are crowd regions .*set both 0"):
        found.check_boxes()
    coco["annotations"] = [{**coco["annotations"][0], "bbox": [1, 1, 0, 0]}]
    with pytest.raises(UserError, match=r"no usable box; 1 boxes dropped \(1 zero area\)"):
        read(tmp_path, coco).check_boxes()


@pytest.mark.parametrize("value", [None, "12", float("nan"), 0, -3, [], float("inf"), 10**400])
def test_an_area_that_is_none_is_taken_from_mask_or_box(tmp_path, value):
    coco = edited(coco_dict(), "annotations", "area", value)
    found = read(tmp_path, coco)
    assert [a["area"] for a in found.annotations] == [200.0] * 3
    note = "1 areas that are no number above 0 are taken from mask or box"
    assert found.notes == [note]
    coco["annotations"][0]["segmentation"] = [[4, 6, 24, 6, 24, 16]]  # half the box
    for masks in ("", "polygon"):
        if masks:
            for entry in coco["annotations"]:
                entry.setdefault("segmentation", [POLYGON])
        found = read(tmp_path, coco, masks=masks)
        assert found.annotations[0]["area"] == 100.0 and found.notes == [note]


def test_an_absent_area_needs_no_word(tmp_path):
    found = read(tmp_path, edited(coco_dict(), "annotations", "area", DELETED))
    assert found.annotations[0]["area"] == 200.0 and found.notes == []


def test_ids_of_annotations_do_not_matter(tmp_path):
    coco = coco_dict()
    for entry, own in zip(coco["annotations"], (0, "x", 0), strict=True):
        entry["id"] = own
    found = read(tmp_path, coco)
    assert [a["id"] for a in found.annotations] == [1, 2, 3]
    assert found.notes == ["1 annotations have the id of another one, and count all the same"]
    del coco["annotations"][0]["id"]
    coco["annotations"][0]["bbox"] = [1, 1, 0, 0]
    assert read(tmp_path, coco).dropped[0]["annotation"] == 0  # its place


def test_references_are_read_as_the_ids_are(tmp_path):
    coco = coco_dict()
    for entry, own in zip(coco["annotations"], ("10", "20.0", "x"), strict=True):
        entry["image_id"] = own
    coco["categories"] = [{"id": own, "name": f"c{own}"} for own in ("10", "2", "1")]
    found = read(tmp_path, coco)
    assert found.category_ids == ["1", "2", "10"]  # counted, not spelt
    assert [(a["image_id"], a["category_id"]) for a in found.annotations] == [(10, "1")]
    assert found.dropped_text() == "2 boxes dropped (2 of an absent image)"
    assert found.notes == [
        "1 references in image_id are read as a number, as the ids are",
        "3 references in category_id are read as a text, as the ids are",
    ]


def test_ids_may_be_texts_throughout_and_whole_floats(tmp_path):
    coco = coco_dict()
    for image in coco["images"]:
        image["id"] = f"i{image['id']}"
    for entry in coco["annotations"]:
        entry["image_id"] = f"i{entry['image_id']}"
        entry["category_id"] = float(entry["category_id"])
    found = read(tmp_path, coco)
    assert [a["image_id"] for a in found.annotations] == ["i10", "i20", "i30"]
    assert [a["category_id"] for a in found.annotations] == [1, 2, 1]


def test_a_box_that_is_absent_is_that_of_the_polygons(tmp_path):
    for value in (DELETED, None, []):
        coco = edited(coco_dict(), "annotations", "bbox", value)
        coco["annotations"][0]["segmentation"] = [[5, 7, 9, 7, 9, 17], [1, 2, 6, 2, 6, 3]]
        found = read(tmp_path, coco)
        assert found.annotations[0]["bbox"] == [1, 2, 8, 15]
        assert found.notes == ["1 annotations without a box get that of their polygons"]


def test_names_that_are_numbers_are_read_as_text(tmp_path):
    found = read(tmp_path, coco_dict(classes=(7, "dog")))
    assert found.class_names == ["7", "dog"]
    assert found.notes == ["category names that are numbers are read as text"]


def test_a_heading_above_all_classes_is_none(tmp_path):
    """Roboflow's root has the name of the project, which may be that of the only class."""
    coco = coco_dict(classes=("dog", "cat", "dog"), category_ids=(0, 1, 2))
    for category, above in zip(coco["categories"], ("none", "dog", "dog"), strict=True):
        category["supercategory"] = above
    for entry in coco["annotations"]:
        entry["category_id"] = 1
    found = read(tmp_path, coco)
    assert (found.category_ids, found.class_names) == ([1, 2], ["cat", "dog"])
    assert found.notes == ["category 0 'dog' is a heading above the others, and no class"]
    coco["categories"][0]["name"] = coco["categories"][1]["supercategory"] = "animal"
    coco["categories"][2]["supercategory"] = "pet"
    assert read(tmp_path, coco).class_names == ["animal", "cat", "dog"]  # not above all
    coco["categories"][2]["supercategory"] = "animal"
    coco["annotations"][0]["category_id"] = 0
    assert read(tmp_path, coco).class_names == ["animal", "cat", "dog"]  # has a box


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = write_coco(tmp_path, coco_dict())
    content = (tmp_path / "labels.json").read_bytes()
    (tmp_path / "labels.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert len(read_coco(path).annotations) == 3


def rle(compressed, polygon=POLYGON):
    found = mask_util.frPyObjects([polygon], 48, 64)[0]
    if compressed:
        return {**found, "counts": found["counts"].decode()}
    pixels = mask_util.decode(found).ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels)) + 1
    return {"size": [48, 64], "counts": np.diff([0, *changes, pixels.size]).tolist()}


MASKS = {"polygon": [POLYGON], "compressed RLE": rle(True), "RLE": rle(False)}


def masked(segmentation, **keys):
    coco = coco_dict(**keys)
    for entry in coco["annotations"]:
        entry["segmentation"] = segmentation
    return coco


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_all_kinds_pass_where_they_may(kind, tmp_path):
    found = read(tmp_path, masked(MASKS[kind]), masks="bitmask")
    assert [a["segmentation"] for a in found.annotations] == [MASKS[kind]] * 3
    assert not any("segmentation" in a for a in read(tmp_path, masked(MASKS[kind])).annotations)
    if kind == "polygon":
        assert len(read(tmp_path, masked(MASKS[kind]), masks="polygon").annotations) == 3


def test_areas_of_masks_are_those_of_pycocotools(tmp_path):
    shape = [4.0, 6.0, 24.0, 9.0, 20.0, 30.0, 9.5, 16.0]
    assert polygon_area([0.0, 0.0, 4.0, 0.0, 4.0, 3.0]) == 6
    for compressed in (True, False):
        coco = masked(rle(compressed, shape))
        for entry in coco["annotations"]:
            del entry["area"]
        area = read(tmp_path, coco, masks="bitmask").annotations[0]["area"]
        assert area == mask_util.area(mask_util.frPyObjects([shape], 48, 64)[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2000), min_size=1, max_size=30))
def test_compressed_counts_are_decoded_as_pycocotools_writes_them(counts):
    total = sum(counts) or 1
    counts = counts if sum(counts) else [1]
    text = mask_util.frPyObjects({"size": [total, 1], "counts": counts}, total, 1)["counts"]
    assert decode_counts(text.decode()) == counts


@pytest.mark.parametrize("text", ["o", "~", "\0", "é", "oo" * 20, "0P", " 1"])
def test_other_texts_are_no_counts(text):
    found = decode_counts(text)
    assert found is None or min(found) < 0 or sum(found) != 48 * 64


@pytest.mark.parametrize(
    "segmentation, said",
    [
        (None, "has no segmentation, but masks are wanted for every box"),
        ([], "has no segmentation"),
        ([POLYGON, 5], "expected polygons [[x, y"),
        ("4 6 24 6", "expected polygons"),
        (5, "expected polygons"),
        ([[4, 6, "24", 6, 4, 16]], "something else than finite numbers"),
        ([[4, 6, float("nan"), 6, 4, 16]], "something else than finite numbers"),
        ({"counts": [1]}, "RLE mask of size None"),
        ({"size": [64, 48], "counts": "x"}, "[64, 48], but its image has [height, width] [48, 64]"),
        ({"size": [48, 64], "counts": [5, -1]}, "RLE mask with counts [5, -1]"),
        ({"size": [48, 64], "counts": {}}, "RLE mask with counts {}"),
        ({"size": [48, 64], "counts": ""}, "RLE mask of 0 pixels, but its image has 3072"),
        ({"size": [48, 64], "counts": [3072, 1]}, "RLE mask of 3073 pixels"),
        (rle(True), "set INPUT.MASK_FORMAT bitmask"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_faulty_mask_is_named_with_its_annotation(segmentation, said, tmp_path):
    coco = masked([POLYGON])
    coco["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(UserError) as caught:
        read(tmp_path, coco, masks="polygon")
    assert said in str(caught.value) and "annotation 101" in str(caught.value)
    assert len(read(tmp_path, coco).annotations) == 3  # boxes alone are not concerned


def test_crowds_may_be_rle_and_dropped_boxes_need_no_mask(tmp_path):
    coco = masked([POLYGON], images=5)
    coco["annotations"][0].update(segmentation=rle(False), iscrowd=1)
    coco["annotations"][1].update(segmentation=None, bbox=[1, 1, 0, 5])
    coco["annotations"][2]["segmentation"] = [[4, 6, 24, 6], [1, 2, 3]]  # no three points
    coco["annotations"][3]["segmentation"] = [POLYGON, [1, 2, 3]]
    found = read(tmp_path, coco, masks="polygon")
    assert [a["segmentation"] for a in found.annotations[1:]] == [[POLYGON]] * 2
    assert found.dropped_text() == (
        "2 boxes dropped (1 zero area, 1 without a polygon of three points)"
    )


def test_keypoints_count_where_they_are_wanted(tmp_path):
    for value, said in ((None, None), ([1, 2, 2, 5, 6, 0], None), ([1, 2], "keypoints [1, 2]")):
        coco = edited(coco_dict(), "annotations", "keypoints", value)
        assert len(read(tmp_path, coco).annotations) == 3
        if said:
            with pytest.raises(UserError, match="annotation 100 has keypoints"):
                read(tmp_path, coco, keypoints=True)
            continue
        entry = read(tmp_path, coco, keypoints=True).annotations[0]
        assert entry.get("num_keypoints") == (1 if value else None)


def test_a_test_set_is_read_for_masks_if_it_has_any(tmp_path):
    assert (
        "segmentation"
        in read_test_set(write_coco(tmp_path, masked([POLYGON])), masks=True).annotations[0]
    )
    plain = read_test_set(write_coco(tmp_path, coco_dict()), masks=True)
    assert plain.notes == ["no object has a mask, so that masks are not evaluated"]
    assert len(plain.annotations) == 3
    coco = masked([POLYGON])
    coco["annotations"][1]["segmentation"] = []
    path = write_coco(tmp_path, coco)
    assert len(read_test_set(path, masks=False).annotations) == 3
    with pytest.raises(UserError, match="annotation 101 has no segmentation"):
        read_test_set(path, masks=True)


def test_a_file_without_annotations_says_which_images_there_are(tmp_path):
    coco = coco_dict()
    del coco["annotations"]
    path = write_coco(tmp_path, coco)
    found = read_coco(path, annotated=False, files=False)
    assert [image["file_name"] for image in found.images] == ["0.png", "1.png", "2.png"]
    with pytest.raises(UserError, match="no list 'annotations'"):
        read_coco(path)
