"""Reading the dataset of an evaluation, by JSON and by registered name."""

import json

import pytest

from deploy.coco_data import load_dataset
from deploy.errors import UserError

from .coco_files import CATEGORY_IDS, SIZES, truth, write_dataset
from .fake_graph import CLASSES


def test_json_beside_its_images(tmp_path):
    data = load_dataset(str(write_dataset(tmp_path)))
    assert [(r["id"], r["height"], r["width"]) for r in data.images] == [
        (10 + i, *size) for i, size in enumerate(SIZES)
    ]
    assert data.images[1]["file"] == str(tmp_path / "images" / "1.png")
    assert data.category_ids(CLASSES) == list(CATEGORY_IDS)
    assert data.category_ids(CLASSES[::-1]) == list(CATEGORY_IDS[::-1])
    # hand-made files leave out what pycocotools reads
    assert data.truth["annotations"][0]["area"] == 48 * 32
    assert data.truth["annotations"][0]["iscrowd"] == 0


def test_image_folder_option_and_flat_layout(tmp_path):
    path = write_dataset(tmp_path)
    other = str(tmp_path / "images" / ".." / "images")
    assert load_dataset(str(path), other).images[0]["file"] == str(tmp_path / "images" / "0.png")
    (tmp_path / "annotations").mkdir()
    moved = path.rename(tmp_path / "annotations" / path.name)
    assert load_dataset(str(moved)).images[0]["file"] == str(tmp_path / "images" / "0.png")
    moved.rename(path)
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match="image '0.png' .* file names are relative to with --images"
    ):
        load_dataset(str(path))


def test_unusable_boxes_are_left_out(tmp_path):
    content = truth()
    bad = [[5, 5, 0, 9], [9, 9, -4, 4], [200, 0, 5, 5], [-9, 0, 9, 5], [0, 0, 1e999, 5]]
    for annotation, box in zip(content["annotations"], bad, strict=False):
        annotation["bbox"] = box
    content["annotations"][5]["image_id"] = 999
    data = load_dataset(str(write_dataset(tmp_path, content)))
    assert [a["bbox"] for a in data.truth["annotations"]] == [
        pytest.approx(a["bbox"]) for a in content["annotations"][6:]
    ]
    assert data.notes == [
        "6 boxes dropped (1 zero area, 1 inverted, 2 outside, 1 not finite, 1 of an absent image)"
    ]


def test_other_class_names_are_refused(tmp_path):
    data = load_dataset(str(write_dataset(tmp_path)))
    with pytest.raises(UserError, match=r"only in the model \['cube'\].*dataset \['triangle'\]"):
        data.category_ids(["circle", "square", "cube"])
    with pytest.raises(UserError, match="differ"):
        data.category_ids(CLASSES[:2])
    data.truth["categories"].append({"id": 99, "name": "circle"})
    with pytest.raises(UserError, match="4 in the dataset"):
        data.category_ids(CLASSES)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c["images"][0].pop("height"), "no 'height'"),
        (lambda c: c["annotations"][0].pop("bbox"), "no 'bbox'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]; expected four"),
        (lambda c: c["annotations"][0].update(category_id=5), "category_id 5, not in 'categories'"),
        (lambda c: c["images"][0].update(id=11), "id 11 occurs twice in 'images'"),
        (lambda c: c["annotations"].clear(), "list 'annotations' is empty"),
    ],
)
def test_damaged_json_is_refused_by_name(tmp_path, change, message):
    content = truth()
    change(content)
    path = write_dataset(tmp_path, content)
    with pytest.raises(UserError, match=rf"test\.json.*{message}"):
        load_dataset(str(path))


@pytest.mark.parametrize("text", ["", "[]", "<html>", '{"images": 3}'])
def test_foreign_files_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"dataset JSON .*x\.json is "):
        load_dataset(str(path))
    with pytest.raises(UserError, match=r"gone\.json"):
        load_dataset(str(tmp_path / "gone.json"))


def test_registered_name_gives_the_same_data(tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    path = write_dataset(tmp_path)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:  # Detectron2 needs them
        annotation |= {"area": 1.0, "iscrowd": 0}
    path.write_text(json.dumps(content))
    register_coco_instances("serve_test", {}, str(path), str(tmp_path / "images"))
    try:
        named, direct = load_dataset("serve_test"), load_dataset(str(path))
        assert named.images == direct.images
        assert named.category_ids(CLASSES) == direct.category_ids(CLASSES)
        boxes = [[a["bbox"] for a in d.truth["annotations"]] for d in (named, direct)]
        assert boxes[0] == [pytest.approx(box) for box in boxes[1]] and len(boxes[0]) == 9
        with pytest.raises(UserError, match="--images goes with a JSON"):
            load_dataset("serve_test", "photos")
    finally:
        DatasetCatalog.remove("serve_test")
        MetadataCatalog.remove("serve_test")


def test_unknown_names_are_user_errors():
    with pytest.raises(ValueError, match="no_such_set") as caught:
        load_dataset("no_such_set")
    assert caught.value.exit_code == 2
