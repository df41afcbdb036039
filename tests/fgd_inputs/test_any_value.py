"""Any JSON value anywhere in a COCO file is read, or refused in one line, alike by all readers.

100 examples each; 2,000 with --hypothesis-profile=thorough.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploy.coco_ap import coco_metrics
from deploy.coco_data import load_dataset
from deploy.serving.coco_results import CocoIds
from fgd.config import get_fgd_cfg
from fgd.data.datasets import register_from_config
from fgd.doctor.examination import _check_config
from fgd.engine.evaluation import build_evaluator
from fgd.study.matches import average_precision, index_truth, match, overall
from fgd.study.summary import ground_truth
from fgd.visualize.__main__ import find_records
from fgd_inputs.coco import read_coco
from fgd_inputs.coco_entries import bad_box
from fgd_inputs.errors import UserError

from .coco_files import write_coco
from .test_coco import POLYGON, masked, rle

LARGE = [10**400, -(10**400), 2**63, 2**64, -(2**63), 10**15]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([*LARGE, 0, 64, 20, 10, 100, 101])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["0", "1", "10", "0.png", "cat", "x\0", "\ud800", "images/0.png", "none"])
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
boxes = st.lists(st.floats(-70, 70) | st.sampled_from([0, 1e-300, 1e300, 64, 48]), min_size=4)
FIELDS = {
    "images": ("id", "file_name", "height", "width", "license", "date_captured", "coco_url"),
    "categories": ("id", "name", "supercategory", "keypoints", "skeleton"),
    "annotations": (
        *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "score"),
        *("segmentation", "keypoints", "num_keypoints", "attributes", "caption"),
    ),
}
fields = st.sampled_from([(key, name) for key, names in FIELDS.items() for name in names])
LISTS = ("images", "categories", "annotations")
TOPS = (*LISTS, "info", "licenses", "type")
IDS = st.sampled_from(
    [
        (0, 1, 2),
        (-1, -2, 5),
        ("a", "b", ""),
        ("2", "1", "10"),
        ("a", "a\0", "\ud800"),
        (10**15, 10**15 + 1, 10**15 + 2),
        (10**18, 10**18 + 1, 10**18 + 2),
        (-1, 2**63, 2),
        (1, 2**53, 2**53 + 1),
        (1e300, 1e301, 1),
    ]
)
ABSENT = object()
changes = st.one_of(
    st.tuples(st.just("field"), fields, st.integers(0, 2), values | st.just(ABSENT)),
    st.tuples(st.just("field"), st.just(("annotations", "bbox")), st.integers(0, 2), boxes),
    st.tuples(st.just("entry"), st.sampled_from(LISTS), st.integers(0, 3), values),
    st.tuples(st.just("top"), st.sampled_from(TOPS), st.none(), values | st.just(ABSENT)),
    st.tuples(st.just("ids"), st.sampled_from(LISTS[:2]), st.booleans(), IDS),
)
shapes = st.sampled_from([[POLYGON], POLYGON, rle(True), rle(False), [], None])


def write_changed(folder, segmentation, changed):
    """Three images with a box each, and what is changed in it; returns the JSON's path."""
    coco = masked(segmentation, classes=("cat", "dog", "bee"))
    path = write_coco(folder, coco)
    for kind, place, position, value in changed:
        holder, name = coco, place
        if kind == "ids":
            rename(coco, place, value, position)
            continue
        if kind == "field":
            holder, name = coco.get(place[0]), place[1]
            holder = holder[position] if isinstance(holder, list) and len(holder) == 3 else None
            if not isinstance(holder, dict):
                continue
        if kind == "entry":
            if isinstance(coco.get(place), list):
                coco[place].insert(position, value)
        elif value is ABSENT:
            holder.pop(name, None)
        else:
            holder[name] = value
    (folder / "labels.json").write_text(json.dumps(coco))
    return path


def rename(coco, key, ids, spelt):
    """Give images or categories other ids; references to them may be spelt."""
    entries, boxes = coco.get(key), coco.get("annotations")
    if not isinstance(entries, list) or not isinstance(boxes, list) or len(entries) != 3:
        return
    for i, own in enumerate(ids):
        if isinstance(entries[i], dict):
            entries[i]["id"] = own
        if i < len(boxes) and isinstance(boxes[i], dict):
            reference = {"images": "image_id", "categories": "category_id"}[key]
            boxes[i][reference] = str(own) if spelt else own


def refusal(read, *args):
    """What a reader returns, and what it says instead, without what to do about it."""
    try:
        return read(*args), ""
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 700
        text.encode()  # can be printed
        return None, text.split("; set ")[0].split("; name the folder")[0]


@settings(deadline=None)
@given(
    changed=st.lists(changes, min_size=1, max_size=2),
    segmentation=shapes,
    masks=st.sampled_from(["", "polygon", "bitmask"]),
    keypoints=st.booleans(),
)
def test_it_is_read_or_refused_in_one_line(
    tmp_path_factory, changed, segmentation, masks, keypoints
):
    path = write_changed(tmp_path_factory.getbasetemp() / "any", segmentation, changed)
    found, said = refusal(lambda: read_coco(path, masks=masks, keypoints=keypoints))
    if found is None:
        assert path in said
        return
    assert json.loads(json.dumps(found.truth())) == found.truth()
    sizes = {image["id"]: (image["height"], image["width"]) for image in found.images}
    assert len(set(found.class_names)) == len(found.class_names) >= 1
    for entry in found.annotations:
        assert bad_box(entry["bbox"], *sizes[entry["image_id"]]) is None
        assert entry["area"] > 0 and entry["iscrowd"] in (0, 1)
        assert entry["category_id"] in found.category_ids
        assert ("segmentation" in entry) == bool(masks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("alike")


def config(path, folder, masks):
    cfg = get_fgd_cfg()
    cfg.DATASETS.JSON.TRAIN = cfg.DATASETS.JSON.TEST = path
    cfg.OUTPUT_DIR = str(folder / "out")
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = masks, "bitmask"
    return cfg


def plain(truth):
    """Of a COCO dict: the boxes with all that is evaluated, the images and the classes."""
    keys = ("id", "height", "width")
    return (
        [{k: v for k, v in entry.items() if k != "segmentation"} for entry in truth["annotations"]],
        [tuple(image[key] for key in keys) for image in truth["images"]],
        truth["categories"],
    )


@settings(deadline=None)
@given(changed=st.lists(changes, min_size=1, max_size=2), segmentation=shapes, masks=st.booleans())
@example(changed=[], segmentation=[POLYGON], masks=False)
@example(changed=[], segmentation=rle(False), masks=True)
def test_all_readers_agree(folder, changed, segmentation, masks):
    path = write_changed(folder, segmentation, changed)
    (folder / "out" / "data_report.json").unlink(missing_ok=True)
    cfg, known = config(path, folder, masks), set(DatasetCatalog.list())
    try:
        check_agreement(cfg, path, folder, masks)
    finally:
        for name in set(DatasetCatalog.list()) - known:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def check_agreement(cfg, path, folder, masks):
    data, said = refusal(lambda: load_dataset(path, masks=masks))  # deploy/evaluate.py
    tested, own = refusal(lambda: register_from_config(cfg, ("TEST",)))  # --eval-only
    assert own == said
    assert refusal(lambda: ground_truth(cfg))[1] == said  # a study
    trained, own = refusal(lambda: register_from_config(cfg))
    assert own == said or masks
    pictures = [str(folder / "images" / f"{i}.png") for i in range(3)]
    drawn, own = refusal(find_records, path, pictures)
    names = data.truth["categories"] if data else [{"name": "cat"}]
    classes = [category["name"] for category in names]
    predicted, other = refusal(CocoIds, pictures, classes, path)
    if data is None:
        assert masks or own == said or "is not in" in said
        return
    (name,) = tested.DATASETS.TEST
    truth = ground_truth(cfg)
    assert plain(truth) == plain(data.truth)
    for text in (own, other):
        assert not text or " times among the images of " in text
    if drawn:
        by_file = {image["file"]: image["id"] for image in data.images}
        assert {picture: drawn[picture]["image_id"] for picture in drawn} == by_file
        assert sum(len(x["annotations"]) for x in drawn.values()) == len(truth["annotations"])
    if predicted:
        assert predicted.images == {image["file"]: image["id"] for image in data.images}
        assert predicted.categories == [category["id"] for category in names]
    if trained:
        check_training(trained, truth, classes)
    check_average_precision(tested, name, data, truth, classes)


def check_training(cfg, truth, classes):
    (name,) = cfg.DATASETS.TRAIN
    records = DatasetCatalog.get(name)
    ids = [category["id"] for category in truth["categories"]]
    found = [
        (record["image_id"], ids[x["category_id"]], x["bbox"], x["iscrowd"])
        for record in records
        for x in record["annotations"]
    ]
    keys = ("image_id", "category_id", "bbox", "iscrowd")
    expected = [tuple(entry[key] for key in keys) for entry in truth["annotations"]]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    stream = SimpleNamespace(dicts=records, unlabeled=())
    finding = _check_config(cfg, stream, None)[0][0].found  # of --doctor
    assert finding.startswith(f"{len(truth['images'])} training images, {len(expected)} boxes")


def check_average_precision(cfg, name, data, truth, classes):
    """Detections that are the boxes themselves, but one, get the same AP from all three."""
    ids = [category["id"] for category in truth["categories"]]
    rows = {image["id"]: [] for image in truth["images"]}
    for entry in truth["annotations"][1:] or truth["annotations"]:
        x, y, w, h = entry["bbox"]
        rows[entry["image_id"]].append(([x, y, x + w, y + h], ids.index(entry["category_id"])))
    evaluator, results, detections = build_evaluator(cfg, name), [], []
    evaluator.reset()
    for image in data.images:
        found = rows[image["id"]]
        corners = np.array([box for box, _ in found], np.float32).reshape(-1, 4)
        labels = np.array([label for _, label in found], int)
        results.append((corners, np.full(len(found), 0.9), labels))
        instances = Instances((image["height"], image["width"]))
        instances.pred_boxes = Boxes(torch.tensor(corners))
        instances.pred_classes = torch.tensor(labels)
        instances.scores = torch.full((len(found),), 0.9)
        record = {"image_id": image["id"], "height": image["height"], "width": image["width"]}
        evaluator.process([record], [{"instances": instances}])
        detections += [
            {
                "image_id": image["id"],
                "category_id": ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": 0.9,
            }
            for (x1, y1, x2, y2), label in zip(corners.tolist(), labels.tolist())
        ]
    deployed = coco_metrics(data, classes, results)["AP"]
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(deployed, nan_ok=True)
    matches = match(index_truth(truth), detections, "bbox")
    studied = overall(average_precision(matches.classes, np.ones((1, len(data.images)))))[0]
    assert studied == pytest.approx(deployed, nan_ok=True, abs=1e-6)
