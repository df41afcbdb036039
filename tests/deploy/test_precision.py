"""The export command in less precision: what it asks for, writes, measures and refuses."""

import copy
import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import deploy.export
import deploy.reduced.precision
from deploy.benchmark import main as benchmark
from deploy.checks.verify_images import draw_scene
from deploy.checks.verify_report import Gate, Tally
from deploy.errors import UserError
from deploy.evaluate import main as evaluate
from deploy.export import main
from deploy.reduced.calibrate import MOST, calibration_files, describe
from deploy.reduced.precision import Reduction
from deploy.reduced.precision_gates import ApLoss, _decide
from deploy.reduced.quantize import int8_model
from deploy.runtime import OrtDetector
from deploy.spec import ModelSpec

from .conftest import CANVAS, CLASSES


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    """Six drawn pictures whose true boxes are what the float32 graph is sure of: its AP is high."""
    folder, rng = tmp_path_factory.mktemp("dataset"), np.random.default_rng(7)
    (folder / "images").mkdir()
    detector, images, annotations = OrtDetector(tiny("RetinaNet").path), [], []
    for i in range(6):
        file = folder / "images" / f"{i}.png"
        Image.fromarray(draw_scene(rng, CANVAS)).save(file)
        images.append({"id": i, "file_name": file.name, "height": CANVAS[0], "width": CANVAS[1]})
        (found,) = detector.detect([file])
        for box, label in zip(found.boxes[:8].tolist(), found.labels[:8].tolist(), strict=True):
            sides = [box[2] - box[0], box[3] - box[1]]
            annotations.append({"image_id": i, "category_id": label, "bbox": [*box[:2], *sides]})
            annotations[-1]["id"] = len(annotations)
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "test.json").write_text(json.dumps(content))
    for i in range(4):
        Image.fromarray(draw_scene(rng, CANVAS)).save(folder / "images" / f"other{i}.png")
    return folder


@pytest.fixture
def export(tiny, dataset, tmp_path, monkeypatch):
    """The command on the tiny RetinaNet -> (exit code, output folder); spares float32's tracing."""
    made = onnx.load(tiny("RetinaNet").path)
    monkeypatch.setattr(deploy.export, "to_onnx", lambda detector, spec: copy.deepcopy(made))

    def run(*options):
        arguments = [tiny("RetinaNet").checkpoint, "--output", tmp_path / "out", *options]
        return main([str(argument) for argument in arguments]), tmp_path / "out"

    return run


@pytest.fixture
def int8_options(dataset):
    return ("--precision", "int8", "--calibration", dataset / "images", "--dataset", dataset / "test.json")  # fmt: skip  # noqa: E501


def test_both_precisions_beside_the_float32_graph(export, int8_options, dataset, capsys):
    code, folder = export("--precision", "fp16", *int8_options, "--max-ap-drop", "20")
    assert code == 0
    kinds = ("", ".fp16", ".int8")
    expected = {f"model{kind}.{suffix}" for kind in kinds for suffix in ("onnx", "json")}
    assert {path.name for path in folder.iterdir()} == {*expected, "report.json"}
    report = json.loads((folder / "report.json").read_text())["precisions"]
    sizes = [(folder / f"model{kind}.onnx").stat().st_size for kind in kinds]
    assert sizes[1] < 0.75 * sizes[0]
    for name, kind in (("fp16", ".fp16"), ("int8", ".int8")):
        content, entry = (folder / f"model{kind}.onnx").read_bytes(), report[name]
        spec = ModelSpec.from_json(folder / f"model{kind}.json")
        assert spec.precision == name and entry["bytes"] == len(content)
        sha256 = hashlib.sha256(content).hexdigest()
        assert spec.hashes["graph_sha256"] == entry["graph_sha256"] == sha256
        assert entry["verification"]["passed"] and entry["ap"]["images"] == 6
        assert entry["ap"]["single"] > 50
        assert entry["ap"]["loss_points"] == entry["ap"]["single"] - entry["ap"]["reduced"]
        (other,) = entry["verification"]["others"]
        assert other["passed"] and other["engine"]["name"] == "openvino"
        assert other["loss"]["reduced"] == pytest.approx(entry["ap"]["reduced"], abs=3)
        tallies = [proof["tally"]["matched"] for proof in (other, entry["verification"])]
        assert min(tallies) > 0.9 * max(tallies) > 100
    assert report["fp16"]["layers"]["float"] == {} and set(report["fp16"]["layers"]["values"]) == {
        "fp16"
    }
    layers = report["int8"]["layers"]
    assert layers["values"]["int8"] > layers["values"]["fp32"] > 0
    assert "multiply-accumulates" in layers["float"]["student.backbone.fpn_lateral3.weight"]
    # the six of the dataset are not calibrated on
    files = calibration_files(
        dataset / "images", [dataset / "images" / f"{i}.png" for i in range(6)]
    )
    assert [path.name for path in files] == [f"other{i}.png" for i in range(4)]
    assert report["int8"]["calibration"] == describe(files)
    # the other commands take the files as they are
    model = str(folder / "model.int8.onnx")
    assert evaluate([model, "--dataset", str(dataset / "test.json")]) == 0
    assert f"{report['int8']['ap']['reduced']:.3f}" in capsys.readouterr().out
    fast = ["--batch-sizes", "1", "--repeats", "2", "--warmup", "1", "--threads", "1"]
    assert benchmark([model, *fast, "--baselines"]) == 0


def damaged(model, spec, reader, recipe):
    """int8 whose first activation has a scale 30 times too small, so that it clips."""
    made = int8_model(model, spec, reader, recipe)
    first = next(node for node in made.graph.node if node.op_type == "QuantizeLinear")
    tensor = next(t for t in made.graph.initializer if t.name == first.input[1])
    values = (numpy_helper.to_array(tensor) / 30).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return made


def test_too_large_a_loss_is_refused(export, int8_options, monkeypatch, capsys):
    monkeypatch.setattr(deploy.reduced.precision, "int8_model", damaged)
    code, folder = export(*int8_options, "--max-ap-drop", "20")
    assert code == 4
    assert "AP loss (points)" in capsys.readouterr().err
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.onnx", "model.json", "report.json", "model.int8.failed.onnx"}
    entry = json.loads((folder / "report.json").read_text())["precisions"]["int8"]
    assert not entry["verification"]["passed"] and entry["ap"]["loss_points"] > 20


def test_a_float32_file_labelled_int8_is_refused(export, int8_options, monkeypatch, capsys):
    monkeypatch.setattr(deploy.reduced.precision, "int8_model", lambda model, *rest: model)
    code, folder = export(*int8_options)
    assert code == 2
    assert "claims int8, but of the weights in its heavy layers 0.0% are" in capsys.readouterr().err
    assert not list(folder.glob("*int8*"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--precision", "int8", "--calibration", "{images}"), "--dataset"),
        (("--precision", "int8", "--dataset", "{json}"), "--calibration"),
        (("--max-ap-drop", "0"), "--max-ap-drop"),
        (("--precision", "fp16", "--dataset", "nowhere.json"), "nowhere.json"),
        (("--precision", "int8", "--calibration", "nowhere", "--dataset", "{json}"), "nowhere"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_written(
    options, named, export, dataset, capsys
):
    paths = {"images": dataset / "images", "json": dataset / "test.json"}
    code, folder = export(*(option.format(**paths) for option in options))
    assert code == 2 and named in capsys.readouterr().err
    assert not folder.exists()


def test_a_new_export_removes_what_the_old_one_left(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.int8.onnx").write_bytes(b"of another checkpoint")
    assert export()[0] == 2
    code, folder = export("--force")
    assert code == 0 and not (folder / "model.int8.onnx").exists()


def test_calibration_images_are_spread_and_never_the_test_set(tmp_path):
    for i in range(MOST * 2):
        (tmp_path / f"{i:03}.png").write_bytes(bytes([i]))
    files = calibration_files(tmp_path)
    assert len(files) == MOST and {files[0].name, files[-1].name} == {
        "000.png",
        f"{MOST * 2 - 1}.png",
    }
    assert describe(files) != describe(files[::-1])
    with pytest.raises(UserError, match="all its images are in --dataset"):
        calibration_files(tmp_path, list(tmp_path.iterdir()))


def test_unknown_recipes_are_refused():
    with pytest.raises(UserError, match="onnx, tensorrt"):
        Reduction(recipe="coreml")


def loss(single, reduced):
    return ApLoss("d", 10, single, reduced)


@pytest.mark.parametrize(
    ("tally", "kept", "measured", "verdict"),
    [
        (None, True, loss(40.0, 39.5), "within its gates"),
        (None, False, loss(40.0, 38.0), "too much is lost"),
        (None, True, loss(0.7, 0.0), "vacuous"),  # a model that finds nothing cannot lose 1 point
        (Tally(matched=19), True, None, "vacuous"),
        (Tally(matched=20), True, None, "within its gates"),
    ],
)
def test_verdicts(tally, kept, measured, verdict):
    gates = [Gate("AP loss (points)", 0.0, "", kept)]
    assert _decide(tally, gates, [], measured, 1.0)[0] == verdict
    assert _decide(tally, gates, ["promise"], measured, 1.0) == ("promise broken", "promise")


def test_loss_in_points_and_relative():
    measured = loss(40.0, 39.0).to_dict()
    assert (measured["loss_points"], measured["loss_relative"]) == (1.0, 0.025)
    assert "loss +1.00 points (+2.5%)" in loss(40.0, 39.0).text()
    assert loss(0.0, 0.0).to_dict()["loss_relative"] is None
