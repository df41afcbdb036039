"""The evaluate command, on a graph and a dataset whose AP is known."""

import json

import numpy as np
import pytest
from PIL import Image

from deploy import evaluate

from .coco_files import truth, write_dataset
from .conftest import ARCHITECTURES, scenes
from .fake_graph import FRACTIONS, fake_spec, write_fake_graph


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run(*args):
    return evaluate.main([str(arg) for arg in args])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_known_boxes_give_ap_100(model, tmp_path, batch_size, capsys):
    dataset, output = write_dataset(tmp_path), tmp_path / "out" / "results.json"
    status = run(model, "--dataset", dataset, "--batch-size", batch_size, "--output", output)
    assert status == 0
    report = json.loads(output.read_text())
    assert report["metrics"]["AP"] == {"onnx": pytest.approx(100)}
    assert report["metrics"]["AP-triangle"] == {"onnx": pytest.approx(100)}
    assert report["metrics"]["APl"] == {"onnx": None}
    assert report["images"] == 3 and report["providers"] == ["CPUExecutionProvider"]
    assert report["shrunk"] == 1  # 120x100 becomes 77x64, the canvas is 64x96
    printed = capsys.readouterr()
    assert "AP-circle" in printed.out and "100.000" in printed.out and printed.err == ""


def test_labels_off_by_one_are_seen(tmp_path):
    """What a wrong class order in the spec would do."""
    write_fake_graph(tmp_path / "m.onnx", fake_spec(classes=["triangle", "circle", "square"]))
    out = tmp_path / "r.json"
    assert run(tmp_path / "m.onnx", "--dataset", write_dataset(tmp_path), "--output", out) == 0
    assert json.loads(out.read_text())["metrics"]["AP"]["onnx"] == 0.0


class MovedEager:
    """Stands in for the PyTorch student: the true boxes, moved by some pixels."""

    classes = list(fake_spec().classes)

    def __init__(self, shift):
        self.shift = shift
        self.student = type("Student", (), {"checkpoint_sha256": "0" * 64})

    def detect(self, record):
        width, height = record["width"], record["height"]
        boxes = np.array(FRACTIONS) * [width, height, width, height] + self.shift
        return boxes.astype(np.float32), np.array([0.9, 0.8, 0.7]), np.arange(3)


@pytest.mark.parametrize("shift, status", [(0.0, 0), (8.0, 4)])
def test_difference_to_the_checkpoint_decides(model, tmp_path, monkeypatch, capsys, shift, status):
    monkeypatch.setattr(evaluate, "load_eager", lambda *_: MovedEager(shift))
    out = tmp_path / "r.json"
    args = (model, "--dataset", write_dataset(tmp_path), "--checkpoint", "x.pth", "--output", out)
    assert run(*args) == status
    row = json.loads(out.read_text())["metrics"]["AP"]  # written in both cases
    assert row["difference"] == pytest.approx(row["onnx"] - row["pytorch"])
    assert (abs(row["difference"]) > 0.05) == (status == 4)
    printed = capsys.readouterr()
    assert "difference" in printed.out and ("error: AP of" in printed.err) == (status == 4)
    assert ("1 images did not fit the graph's canvas" in printed.err) == (status == 4)


def test_image_of_another_size_than_the_dataset_says(model, tmp_path, capsys):
    dataset = write_dataset(tmp_path)
    Image.new("RGB", (64, 96)).save(tmp_path / "images" / "0.png")
    assert run(model, "--dataset", dataset) == 2
    assert "0.png is 96x64 (height x width) but the dataset says 64x96" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["classes", "image", "checkpoint", "dataset", "batch"])
def test_bad_usage_is_one_line_and_exit_2(model, tmp_path, what, capsys):
    content, extra = truth(), ()
    if what == "classes":
        content["categories"][0]["name"] = "cube"
    dataset = write_dataset(tmp_path, content)
    if what == "image":
        (tmp_path / "images" / "1.png").unlink()
    elif what == "checkpoint":
        extra = ("--checkpoint", tmp_path / "gone_image.pth")
    elif what == "batch":
        extra = ("--batch-size", 0)
    elif what == "dataset":
        dataset = tmp_path / "no_dataset.json"
    assert run(model, "--dataset", dataset, *extra) == 2
    (line,) = capsys.readouterr().err.splitlines()
    named = {"image": "1.png", "checkpoint": "gone_image.pth", "batch": "--batch-size"}
    assert line.startswith("error: ") and named.get(what, what) in line


def write_scenes(folder, eager):
    """The images that the tiny student's scores are spread on, so that no ranking is a coin toss.

    Ground truth: every third detection of PyTorch, for a middling AP.
    """
    (folder / "images").mkdir()
    images, annotations = [], []
    for i, scene in enumerate(scenes().numpy().astype(np.uint8).transpose(0, 2, 3, 1)):
        name, (height, width) = f"{i}.png", scene.shape[:2]
        Image.fromarray(scene[:, :, ::-1]).save(folder / "images" / name)
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        record = {"file": str(folder / "images" / name), **images[-1]}
        boxes, _, labels, masks = eager.detect(record)
        for row in range(0, len(boxes), 3):
            x1, y1, x2, y2 = boxes[row].tolist()
            box, label = [x1, y1, x2 - x1, y2 - y1], int(labels[row])
            entry = {"id": len(annotations), "image_id": i, "category_id": label, "bbox": box}
            if masks:
                entry["segmentation"] = masks[row]
            annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in enumerate(eager.classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "scenes.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_graph_and_checkpoint_reach_the_same_ap(exported, tmp_path, arch, capsys):
    student, out = exported(arch), tmp_path / "r.json"
    eager = evaluate.load_eager(student.checkpoint, student.spec)
    dataset = write_scenes(tmp_path, eager)
    options = ("--dataset", dataset, "--checkpoint", student.checkpoint, "--output", out)
    assert run(student.path, *options) == 0
    report = json.loads(out.read_text())
    assert 10 < report["metrics"]["AP"]["pytorch"] < 90
    for row in report["metrics"].values():
        assert row["onnx"] is None or abs(row["difference"]) < 0.05
    assert report["checkpoint_sha256"] == student.spec.hashes["checkpoint_sha256"]
    assert "pytorch" in capsys.readouterr().out


def test_mask_ap_of_graph_and_checkpoint(tiny, tmp_path, capsys):
    """Then a dataset without masks: box AP alone, and that is said; of some masks: refused."""
    student, out = tiny("Mask R-CNN"), tmp_path / "r.json"
    eager = evaluate.load_eager(student.checkpoint, student.spec)
    dataset = write_scenes(tmp_path, eager)
    options = ("--dataset", dataset, "--checkpoint", student.checkpoint, "--output", out)
    assert run(student.path, *options) == 0
    metrics = json.loads(out.read_text())["metrics"]
    assert 10 < metrics["mask AP"]["pytorch"] < 90 and "mask AP-star" in metrics
    assert abs(metrics["mask AP"]["difference"]) < 0.05
    assert metrics["mask AP"]["onnx"] != metrics["AP"]["onnx"]
    assert "no mask AP" not in capsys.readouterr().out
    content = json.loads(dataset.read_text())
    del content["annotations"][3]["segmentation"]
    dataset.write_text(json.dumps(content))
    assert run(student.path, "--dataset", dataset, "--output", out) == 2
    assert "has no segmentation, but masks are wanted" in capsys.readouterr().err
    for entry in content["annotations"]:
        entry.pop("segmentation", None)
    dataset.write_text(json.dumps(content))
    assert run(student.path, "--dataset", dataset, "--output", out) == 0
    assert "mask AP" not in json.loads(out.read_text())["metrics"]
    assert f"{dataset}: no object has a mask" in capsys.readouterr().out


def test_a_checkpoint_of_other_classes_is_refused(exported, tmp_path, capsys):
    student = exported("RetinaNet")
    write_fake_graph(tmp_path / "model.onnx")
    options = ("--dataset", write_dataset(tmp_path), "--checkpoint", student.checkpoint)
    assert run(tmp_path / "model.onnx", *options) == 2
    assert "has classes ['disc', 'box', 'star'], the graph has" in capsys.readouterr().err


def test_a_class_name_stays_on_its_line():
    row = {"onnx": 1.0}
    table = evaluate.format_table({"AP": row, "AP-a\n\x1b[2Jb": row})
    assert table.splitlines()[2].split() == ["AP-a", "\\x1b[2Jb", "1.000"]
