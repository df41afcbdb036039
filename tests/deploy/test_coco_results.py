"""COCO results: ids, categories and boxes as pycocotools reads them."""

import json
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deploy import predict
from deploy.serving.coco_results import CocoIds

from .coco_files import truth, write_dataset
from .fake_graph import write_fake_graph


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run(*args):
    return predict.main([str(arg) for arg in args])


def box_ap(dataset, results):
    """As pycocotools measures it, which needs "area" and "iscrowd"."""
    annotations = COCO(dataset)
    for annotation in annotations.dataset["annotations"]:
        annotation |= {"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3]}
    evaluation = COCOeval(annotations, annotations.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def test_coco_results_score_100_against_the_truth(model, tmp_path):
    """Ids, categories and boxes are the dataset's: AP 100 on boxes that are known."""
    dataset, out = write_dataset(tmp_path), tmp_path / "out"
    options = ("--format", "coco", "--annotations", dataset, "--score", 0, "--no-images")
    assert run(model, tmp_path / "images", "--output", out, *options) == 0
    results = json.loads((out / "coco_results.json").read_text())
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    assert not (out / "coco_images.json").exists()
    assert box_ap(dataset, results) == pytest.approx(1)
    results[0]["category_id"] = 3 if results[0]["category_id"] == 7 else 7
    assert box_ap(dataset, results) < 0.99  # the comparison can fail


def test_coco_results_without_a_dataset_say_what_the_ids_are(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in {"a.png": (96, 64), "b.jpg": (64, 96), "c.PNG": (200, 100)}.items():
        Image.new("RGB", size, (26, 153, 255)).save(photos / name)
    (photos / "a1.jpg").write_bytes(b"cut")
    out = tmp_path / "out"
    assert run(model, photos, "--output", out, "--format", "coco", "--no-images") == 2
    names = COCO(out / "coco_images.json")
    results = names.loadRes(str(out / "coco_results.json"))
    boxes = {}
    for row in results.dataset["annotations"]:
        image, category = names.imgs[row["image_id"]], names.cats[row["category_id"]]
        boxes[Path(image["file_name"]).name, category["name"]] = row["bbox"]
    assert len(boxes) == 6 and boxes["b.jpg", "square"] == [16, 24, 32, 72]
    assert sorted(names.imgs) == [1, 3, 4]  # 2 could not be read


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["images"].pop(), "2.png is 0 times among the images"),
        (lambda d: d["images"].append({**d["images"][0], "id": 99}), "0.png is 2 times"),
        (lambda d: d["images"].append(d["images"][0]), "id 10 occurs twice in 'images'"),
        (lambda d: d["categories"].pop(), "classes of the model and of"),
        (lambda d: d.pop("images"), "it has no list 'images'"),
        (lambda d: d["images"][0].update(file_name=3), "image 10 has file_name 3"),
    ],
)
def test_annotations_that_do_not_fit_are_refused_before_the_work(
    model, tmp_path, change, message, capsys
):
    content = truth()
    change(content)
    dataset = write_dataset(tmp_path, content)
    options = ("--format", "coco", "--annotations", dataset)
    assert run(model, tmp_path / "images", "--output", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_masks_become_segmentations():
    rle = {"size": [2, 2], "counts": "04"}
    image = {"file": "a", "boxes": [[1.0, 2.0, 4.0, 8.5]], "scores": [0.5], "labels": [1]}
    (result,) = CocoIds([Path("a")], ["x", "y"]).results([{**image, "segmentations": [rle]}])
    box = {"image_id": 1, "category_id": 2, "bbox": [1.0, 2.0, 3.0, 6.5], "score": 0.5}
    assert result == {**box, "segmentation": rle}


def test_annotations_may_name_folders(model, tmp_path):
    content = truth()
    for image in content["images"]:
        image["file_name"] = "images/" + image["file_name"]
    options = ("--format", "coco", "--annotations", write_dataset(tmp_path, content))
    assert run(model, tmp_path / "images", "--output", tmp_path / "out", *options) == 0
