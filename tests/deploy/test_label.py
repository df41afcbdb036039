"""The label command: who may label, from which score on, and what the file says of it."""

import hashlib
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deploy import label
from deploy.coco_ap import Outcomes
from deploy.eager import EagerDetector
from deploy.labels.gate import LEAST_BOXES, lowest_score
from deploy.labels.teacher import GraphTeacher
from deploy.serving.paste import encode_rle
from fgd.data.datasets import register_from_config
from fgd_inputs.coco import read_coco
from tests.conftest import make_tiny_cfg

from .coco_files import CATEGORY_IDS, xywh
from .conftest import conditioned, make_cfg, save_checkpoint
from .fake_graph import CLASSES, FRACTIONS, fake_spec, write_fake_graph

IDS = sorted(CATEGORY_IDS)  # in the order of the classes, as training counts them
SCORES = (250, 230, 200, 170, 140, 110, 80, 50)  # of the teacher's box of each class, over 255


def write_image(path, red, green=128, blue=128):
    """The fake graph's scores of circle, square and triangle are blue, green and red over 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (96, 64), (red, green, blue)).save(path)


def write_labelled(folder, wrong=()):
    """Eight images; those of the numbers in ``wrong`` have the triangle elsewhere."""
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in zip(IDS, CLASSES)],
    }
    for number, score in enumerate(SCORES):
        name = f"{number}.png"
        write_image(folder / "images" / name, score, 255 - number, 128)
        content["images"].append({"id": number, "file_name": name, "height": 64, "width": 96})
        for label_, (category, fractions) in enumerate(zip(IDS, FRACTIONS)):
            box = xywh(fractions, 64, 96)
            if label_ == 2 and number in wrong:
                box = [0, 60, 5, 4]
            found = {"id": len(content["annotations"]), "image_id": number, "bbox": box}
            content["annotations"].append({**found, "category_id": category})
    path = folder / "labelled.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def case(tmp_path):
    """A graph, labelled images whose triangles are right down to a score of 170, and photos."""
    write_fake_graph(tmp_path / "model.onnx")
    labelled = write_labelled(tmp_path / "known", wrong=(5, 6, 7))
    photos = tmp_path / "photos"
    write_image(photos / "a.png", 200)
    write_image(photos / "b.png", 60)
    write_image(photos / "c.png", 139, 128, 20)
    return tmp_path / "model.onnx", photos, labelled, tmp_path / "labels.json"


def run(case, *more):
    model, photos, labelled, output = case
    args = [model, photos, "--output", output, "--validate", labelled, *more]
    return label.main([str(x) for x in args])


def refused(case, capsys, *more):
    assert run(case, *more) == 2
    assert not case[3].exists() and not case[3].with_name("labels.json.jsonl").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_thresholds_of_each_class_and_what_is_written(case, tmp_path, capsys):
    assert run(case, "--precision", "0.8") == 0
    content = json.loads(case[3].read_text())
    sha256 = hashlib.sha256(case[0].read_bytes()).hexdigest()
    info = content["info"]
    assert info["teacher"] == {"file": str(case[0]), "sha256": sha256}
    # 5 of 6 triangles down to 110 are right, 5 of 7 further down
    found = info["thresholds"]["triangle"]
    assert found == {
        "wanted": 0.8,
        "score": pytest.approx(110 / 255, abs=1e-6),
        "precision": pytest.approx(5 / 6),
        "recall": pytest.approx(5 / 8),
        "boxes": 6,
    }
    assert info["thresholds"]["circle"]["score"] == pytest.approx(128 / 255, abs=1e-6)
    assert info["validated_on"]["images"] == 8 and info["validated_on"]["ap50"] > 80
    assert content["categories"] == [{"id": i, "name": n} for i, n in zip(IDS, CLASSES)]
    assert [x["file_name"] for x in content["images"]] == ["a.png", "b.png", "c.png"]
    per_image = {x["id"]: [] for x in content["images"]}
    for box in content["annotations"]:
        per_image[box["image_id"]].append(CLASSES[IDS.index(box["category_id"])])
        assert box["made_by"] == sha256 and box["score"] >= box["threshold"]
    # green is 248 on the labelled images at least, and 128 here: no square is sure enough
    assert per_image == {1: ["circle", "triangle"], 2: ["circle"], 3: ["triangle"]}
    image = case[1] / "a.png"
    assert content["images"][0]["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert "DATASETS.JSON.TRAIN_IMAGES" in capsys.readouterr().out


def test_training_takes_the_file(case, tmp_path):
    assert run(case, "--add", case[2]) == 0
    cfg = make_tiny_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.DATASETS.JSON.TRAIN = str(case[3])
    cfg.DATASETS.JSON.TRAIN_IMAGES = json.loads(case[3].read_text())["info"]["images"]
    (name,) = register_from_config(cfg, ("TRAIN",)).DATASETS.TRAIN
    records = DatasetCatalog.get(name)
    assert MetadataCatalog.get(name).thing_classes == list(CLASSES)
    assert [len(x["annotations"]) for x in records] == [2, 1, 0, *[3] * 8]
    assert records[-1]["file_name"].endswith("known/images/7.png")


def test_a_teacher_below_the_gate_writes_nothing(case, capsys):
    write_fake_graph(case[0], fractions=((0, 0, 0.1, 0.1),) * 3)
    line = refused(case, capsys)
    assert line == (
        f"error: {case[0]} has AP50 0.0 on {case[2]}, below --min-ap50 50: nothing was written. "
        "Use a better teacher, or ask for less"
    )


def test_a_precision_that_no_score_reaches(case, tmp_path, capsys):
    write_labelled(tmp_path / "known", wrong=(0, 5, 6, 7))
    line = refused(case, capsys)
    assert "'triangle' (0.800 at best, asked 0.9). Nothing was written" in line
    assert run(case, "--precision", "triangle=none") == 0
    content = json.loads(case[3].read_text())
    assert {x["category_id"] for x in content["annotations"]} == {IDS[0]}


@pytest.mark.parametrize(
    "more, said",
    [
        (("--precision", "star=0.5"), "error: --precision star=0.5: the teacher has no class"),
        (("--precision", "0"), "error: --precision 0: expected a number above 0 and up to 1"),
        (("--precision", "nan"), "error: --precision nan: expected a number"),
        (("--min-ap50", "101"), "error: --min-ap50 is 101, expected a percentage"),
    ],
)
def test_wrong_usage(case, capsys, more, said):
    assert refused(case, capsys, *more).startswith(said)


def test_classes_in_another_order(case, capsys):
    classes = ["square", "circle", "triangle"]
    write_fake_graph(case[0], fake_spec(classes=classes))
    line = refused(case, capsys)
    assert "class 0 is 'square' in the teacher, 'circle' in the dataset" in line


def test_human_labels_are_never_overwritten(case, capsys):
    before = case[2].read_bytes()
    assert run((*case[:3], case[2])) == 2
    assert "is a file that is read here; choose another" in capsys.readouterr().err
    case[3].write_text('{"images": []}')
    assert run(case) == 2
    assert "is there and not of this command" in capsys.readouterr().err
    assert case[2].read_bytes() == before


def test_images_that_have_labels_are_left_out_by_content(case, tmp_path, capsys):
    content = (tmp_path / "known" / "images" / "3.png").read_bytes()
    (case[1] / "renamed.png").write_bytes(content)
    test = tmp_path / "test.json"
    (case[1] / "a.png").rename(tmp_path / "a.png")
    write_image(case[1] / "copy.png", 200)
    image = {"id": 1, "file_name": "a.png", "height": 64, "width": 96}
    test.write_text(json.dumps({"images": [image], "categories": [{"id": 1, "name": "x"}]}))
    assert run(case, "--exclude", test) == 0
    names = [x["file_name"] for x in json.loads(case[3].read_text())["images"]]
    assert names == ["b.png", "c.png"]
    assert "2 images have labels or are excluded" in capsys.readouterr().err
    assert run(case, "--exclude", case[1]) == 2
    assert "all 4 images have labels or are excluded" in capsys.readouterr().err


def test_damaged_images_are_named_and_left_out(case, capsys):
    (case[1] / "b.png").write_bytes(b"no image")
    assert run(case) == 2
    content = json.loads(case[3].read_text())
    assert [x["file_name"] for x in content["images"]] == ["a.png", "c.png"]
    (failed,) = content["info"]["failed"]
    assert failed["file"].endswith("b.png") and "failed: " in capsys.readouterr().err


def test_resumed_equals_whole_and_asks_only_for_the_rest(case, monkeypatch):
    assert run(case) == 0
    whole = json.loads(case[3].read_text())
    journal = case[3].with_name("labels.json.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # as a kill leaves it
    asked = []
    own = GraphTeacher.detect
    monkeypatch.setattr(
        GraphTeacher, "detect", lambda self, file: asked.append(file.name) or own(self, file)
    )
    assert run(case, "--resume") == 0
    assert asked[len(SCORES) :] == ["b.png", "c.png"]
    again = json.loads(case[3].read_text())
    for content in (whole, again):
        del content["info"]["seconds"]
    assert again == whole


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40),
    st.sampled_from([0.3, 0.5, 0.75, 0.9, 1.0]),
)
def test_no_lower_score_has_the_precision(boxes, wanted):
    """Against every score as a threshold, one by one."""
    scores = np.array([x / 10 for x, _ in boxes])
    hits = np.array([x for _, x in boxes], bool)
    found = lowest_score(Outcomes(scores, hits, 50), wanted)
    good = [
        score
        for score in scores
        if (scores >= score).sum() >= LEAST_BOXES and hits[scores >= score].mean() >= wanted - 1e-9
    ]
    assert (found and found.score) == (min(good) if good else None)
    if found:
        assert found.boxes == (scores >= found.score).sum()
        assert found.precision == pytest.approx(hits[scores >= found.score].mean())


def test_a_checkpoint_finds_what_detectron2_does(tmp_path):
    cfg = make_cfg("RetinaNet")
    checkpoint = save_checkpoint(conditioned(cfg), cfg, tmp_path / "model.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    teacher = label.load_teacher(str(checkpoint))
    found = teacher.detect(tmp_path / "a.png")
    record = {"file": str(tmp_path / "a.png"), "height": 80, "width": 100, "id": 1}
    boxes, scores, labels, _ = EagerDetector(checkpoint, 0.05).detect(record)
    assert (found["height"], found["width"]) == (80, 100) and len(scores) > 5
    assert found["labels"] == labels.tolist()
    np.testing.assert_allclose(found["scores"], scores, atol=1e-6)
    np.testing.assert_allclose(found["boxes"], boxes, atol=1e-3)
    assert teacher.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_masks_are_written_as_training_reads_them(case, monkeypatch):
    own = GraphTeacher.detect

    def with_masks(self, file):
        entry = own(self, file)
        mask = np.zeros((64, 96), bool)
        mask[:10, :20] = True
        return {**entry, "masks": [encode_rle(mask) for _ in entry["scores"]]}

    monkeypatch.setattr(GraphTeacher, "detect", with_masks)
    assert run(case) == 0
    found = read_coco(str(case[3]), str(case[1]), masks="bitmask")
    assert [x["area"] for x in found.annotations] == [200] * 3
