import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from fgd.study.matches import average_precision, index_truth, match, overall

CLASSES = {3: "cat", 7: "dog", 9: "emu"}  # there is no true emu


def random_case(seed, images=7, scale=1.0):
    """Truth with crowds and detections near it, some far off; scores all differ."""
    random = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": i, "name": name} for i, name in CLASSES.items()]
    detections = []
    for image in range(1, images + 1):
        truth["images"].append({"id": image, "width": 100, "height": 100})
        for _ in range(random.integers(0, 5)):
            box = [*random.uniform(0, 60, 2), *(scale * random.uniform(5, 40, 2))]
            category = int(random.choice([3, 7]))
            crowd = int(random.random() < 0.2)
            number = len(truth["annotations"]) + 1
            fields = {"id": number, "image_id": image, "area": box[2] * box[3], "iscrowd": crowd}
            truth["annotations"].append({**fields, "category_id": category, "bbox": box})
            for _ in range(random.integers(0, 4)):
                near = (np.array(box) + random.normal(0, 3, 4)).clip(1).tolist()
                detections.append({"image_id": image, "category_id": category, "bbox": near})
        far = [*random.uniform(0, 60, 2), 20, 20]
        detections.append(
            {"image_id": image, "category_id": int(random.choice([3, 9])), "bbox": far}
        )
    scores = random.permutation(len(detections)) / len(detections)
    return truth, [{**d, "score": float(s)} for d, s in zip(detections, scores)]


def repeated(truth, detections, counts):
    """The set with each image so many times, under new ids."""
    again, found = {**truth, "images": [], "annotations": []}, []
    for image, count in zip(truth["images"], counts):
        for _ in range(count):
            new = len(again["images"]) + 1
            again["images"].append({**image, "id": new})
            for a in truth["annotations"]:
                if a["image_id"] == image["id"]:
                    number = len(again["annotations"]) + 1
                    again["annotations"].append({**a, "image_id": new, "id": number})
            found += [{**d, "image_id": new} for d in detections if d["image_id"] == image["id"]]
    return again, found


def coco_eval(truth, detections, kind="bbox"):
    """AP of all classes, of each, and of each size, in percent, by pycocotools alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = index_truth(truth)
        evaluation = COCOeval(coco, coco.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = [
        p[p > -1].mean() if (p > -1).any() else np.nan for p in np.moveaxis(precision, 2, 0)
    ]
    sizes = np.where(evaluation.stats[3:6] < 0, np.nan, evaluation.stats[3:6])
    return 100 * evaluation.stats[0], 100 * np.array(per_class), 100 * sizes


@pytest.mark.parametrize("seed", range(4))
def test_equals_coco_eval_on_the_real_set_and_on_resampled_ones(seed):
    truth, detections = random_case(seed)
    random = np.random.default_rng(seed)
    sets = np.concatenate([np.ones((1, 7), int), random.multinomial(7, np.full(7, 1 / 7), 5)])
    matches = match(index_truth(truth), detections, "bbox")
    assert list(matches.classes) == list(CLASSES.values())
    found = average_precision(matches.classes, sets)
    for counts, per_class in zip(sets, found, strict=True):
        expected, expected_per_class, _ = coco_eval(*repeated(truth, detections, counts))
        np.testing.assert_allclose(per_class, expected_per_class, rtol=0, atol=1e-12)
        np.testing.assert_allclose(overall(per_class), expected, rtol=0, atol=1e-12)
    assert 1 < overall(found)[0] < 99, "vacuous"


@pytest.mark.parametrize(("seed", "scale"), [(0, 3), (1, 6), (2, 6), (3, 0.7), (4, 5)])
def test_sizes_equal_coco_eval_on_the_real_set_and_on_resampled_ones(seed, scale):
    """Objects that count beside such that do not, crowds, detections of another size than theirs;
    at the smallest scale there is no large object.
    """
    truth, detections = random_case(seed, scale=scale)
    random = np.random.default_rng(seed)
    sets = np.concatenate([np.ones((1, 7), int), random.multinomial(7, np.full(7, 1 / 7), 4)])
    sizes = match(index_truth(truth), detections, "bbox").sizes
    assert list(sizes) == ["small", "medium", "large"]
    found = [overall(average_precision(x, sets)) for x in sizes.values()]
    for counts, *own in zip(sets, *found, strict=True):
        expected = coco_eval(*repeated(truth, detections, counts))[2]
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-12)
    assert np.isnan(found[2][0]) == (scale < 1) and np.nanmax(found) > 1, "vacuous"


def test_an_object_with_the_id_0_is_never_found_in_pycocotools():
    truth, detections = random_case(1, scale=3)
    truth["annotations"] = [{**a, "id": a["id"] - 1} for a in truth["annotations"]]
    sizes = match(index_truth(truth), detections, "bbox").sizes
    found = [overall(average_precision(x, np.ones((1, 7))))[0] for x in sizes.values()]
    np.testing.assert_allclose(found, coco_eval(truth, detections)[2], rtol=0, atol=1e-12)


def test_masks_are_matched_as_masks():
    """The second detection has the box of its object, but not its shape."""
    square = [[10, 10, 40, 10, 40, 40, 10, 40]]
    triangle = [[10, 10, 40, 10, 10, 40]]
    truth = {
        "images": [{"id": i, "width": 64, "height": 64} for i in (1, 2)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 30, 30], "area": 900}
            | {"iscrowd": 0, "segmentation": square}
            for i in (1, 2)
        ],
    }
    detections = [
        {"image_id": i, "category_id": 1, "bbox": [10, 10, 30, 30], "score": 1 - i / 10}
        | {"segmentation": mask.merge(mask.frPyObjects(shape, 64, 64))}
        for i, shape in ((1, square), (2, triangle))
    ]
    sets = np.array([[1, 1], [2, 0], [0, 2]])
    boxes = average_precision(match(index_truth(truth), detections, "bbox").classes, sets)[:, 0]
    masks = average_precision(match(index_truth(truth), detections, "segm").classes, sets)[:, 0]
    np.testing.assert_allclose(boxes, 100, atol=1e-12)
    assert masks[1] == pytest.approx(100) and masks[2] < 15
    without_boxes = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    assert masks[0] == pytest.approx(coco_eval(truth, without_boxes, "segm")[0], abs=1e-12)


def test_no_detections_and_no_objects():
    truth, _ = random_case(0)
    found = average_precision(match(index_truth(truth), [], "bbox").classes, np.ones((1, 7)))
    np.testing.assert_array_equal(found, [[0, 0, np.nan]])
    assert overall(found)[0] == 0
    assert np.isnan(overall(np.full((2, 3), np.nan))).all()


def test_portions_change_nothing(monkeypatch):
    truth, detections = random_case(1)
    matches = match(index_truth(truth), detections, "bbox").classes
    sets = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), 20)
    whole = average_precision(matches, sets)
    monkeypatch.setattr("fgd.study.matches._CELLS", 1)
    np.testing.assert_array_equal(average_precision(matches, sets), whole)
