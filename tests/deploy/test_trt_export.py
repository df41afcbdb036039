"""Exports for TensorRT: the same detections, standard operators, nothing of variable size."""

import json

import numpy as np
import onnx
import pytest
import torch

import deploy.export
import deploy.graphs.tensorrt.static_ops
from deploy.checks.tiny import scenes, tiny_cfg, write_scenes
from deploy.export import main
from deploy.graphs.regions import propose
from deploy.graphs.tensorrt.build import build_commands
from deploy.runtime import OrtDetector
from deploy.spec import ModelSpec
from deploy.trt_lint import REPORTED, lint

from .conftest import conditioned
from .test_spec import _spec

NAMES = ("RepPoints", "Mask R-CNN")
SIZES = np.array([[96, 128], [96, 70], [50, 128]], np.int32)


@pytest.fixture(scope="module")
def for_tensorrt(export_tiny):
    made = {}

    def get(name):
        if name not in made:
            made[name] = export_tiny(tiny_cfg(name), "--target", "tensorrt")
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_it_passes_the_gates_of_any_export(name, for_tensorrt):
    report = json.loads((for_tensorrt(name).folder / "report.json").read_text())
    verification = report["verification"]
    assert verification["passed"] and not verification["warnings"]
    assert verification["tally"]["unmatched"] == 0 and verification["tally"]["matched"] > 100
    assert 1 <= verification["nms_rounds"] < 12
    assert for_tensorrt(name).spec.target == "tensorrt"


@pytest.mark.parametrize("name", NAMES)
def test_operators_and_sizes(name, for_tensorrt):
    model = onnx.load(for_tensorrt(name).path)
    assert lint(model) == []
    kinds = {node.op_type for node in model.graph.node}
    refused = {"NonMaxSuppression", "NonZero", "ScatterND", "GatherND", "If", "Loop", "Range"}
    assert not kinds & refused and not kinds & {*REPORTED} and "Trilu" in kinds
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    values = [*model.graph.input, *model.graph.output]
    for value in values:
        batch, *sizes = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch" and all(size.dim_value > 0 for size in sizes)
        assert value.type.tensor_type.elem_type != onnx.TensorProto.INT64


@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_sees_no_difference_to_the_default_graph(name, for_tensorrt, tiny):
    images = scenes(3).numpy()
    static = OrtDetector(for_tensorrt(name).path).run(images, SIZES)
    default = OrtDetector(tiny(name).path).run(images, SIZES)
    assert list(static) == list(default) and static["num_dets"].sum() > 20
    for key in default:
        np.testing.assert_allclose(static[key], default[key], atol=1e-3)


@pytest.mark.parametrize("most", [30, 100, 1000])
def test_proposals_level_by_level_are_the_same(most):
    """With room for fewer, for some and for more than NMS keeps."""
    model = conditioned(tiny_cfg("Faster R-CNN"))
    rpn, sizes = model.proposal_generator, torch.tensor([[96, 128], [50, 128]])
    rpn.post_nms_topk[False] = most
    features = model.backbone(model.preprocess_image([{"image": x} for x in scenes(2)]).tensor)
    with torch.no_grad():
        raw = rpn.rpn_head([features[level] for level in rpn.in_features])
    together = propose(rpn, *raw, sizes)
    apart = propose(rpn, *raw, sizes, level_by_level=True)
    rows = apart.shape[1]
    assert 20 < (apart[0, :, 2] > 0).sum() <= rows <= most
    torch.testing.assert_close(apart, together[:, :rows], rtol=0, atol=0)
    assert not together[:, rows:].any()


def test_the_report_says_how_to_build_an_engine_and_that_none_was(for_tensorrt):
    exported = for_tensorrt("Mask R-CNN")
    told = json.loads((exported.folder / "report.json").read_text())["tensorrt"]["model.onnx"]
    assert told["engine_built"] is False
    assert told["commands"] == build_commands(exported.spec, str(exported.path))
    assert "no engine was built" in told["notes"][0] and "RoiAlign" in told["notes"][1]


def test_command_lines():
    spec = _spec(dynamic="batch", target="tensorrt", height=96, width=128)
    shapes = " ".join(
        f"--{name}Shapes=images:{batch}x3x96x128,image_sizes:{batch}x2"
        for name, batch in (("min", 1), ("opt", 4), ("max", 8))
    )
    assert build_commands(spec, "out/model.int8.onnx") == {
        "10": "trtexec --stronglyTyped --onnx=out/model.int8.onnx "
        f"--saveEngine=out/model.int8.engine {shapes}",
        "11": f"trtexec --onnx=out/model.int8.onnx --saveEngine=out/model.int8.engine {shapes}",
    }
    spec = _spec(dynamic="none", target="tensorrt", height=96, width=128)
    assert build_commands(spec, "a b.onnx") == {
        "10": "trtexec --stronglyTyped --onnx='a b.onnx' --saveEngine='a b.engine'",
        "11": "trtexec --onnx='a b.onnx' --saveEngine='a b.engine'",
    }


@pytest.fixture
def checkpoint(for_tensorrt, tmp_path):
    path = tmp_path / "student.pth"
    path.write_bytes(for_tensorrt("RepPoints").checkpoint.read_bytes())
    return path


def test_what_tensorrt_would_refuse_is_no_model(checkpoint, for_tensorrt, monkeypatch, capsys):
    """A NonZero that changes nothing: every detection is right, and the file is refused."""
    model = onnx.load(for_tensorrt("RepPoints").path)
    model.graph.node.append(onnx.helper.make_node("NonZero", ["scores"], ["rows"], "planted"))
    monkeypatch.setattr(deploy.export, "to_onnx", lambda detector, spec: model)
    assert main([str(checkpoint), "--target", "tensorrt"]) == 4
    assert "for TensorRT, planted: NonZero" in capsys.readouterr().err
    folder = checkpoint.with_name("student_onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.failed.onnx", "report.json"]
    report = json.loads((folder / "report.json").read_text())
    assert report["verification"]["tally"]["unmatched"] == 0 and "tensorrt" not in report


def test_too_few_rounds_fail_and_are_said(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(deploy.graphs.tensorrt.static_ops, "ROUNDS", 2)
    assert main([str(checkpoint), "--target", "tensorrt"]) == 4
    captured = capsys.readouterr()
    assert "NOT CONVERGED: 2 rounds of static NMS were too few for" in captured.out
    assert "the graph differs: in ONNX Runtime 1." in captured.err
    assert ", over the gate: matched" in captured.err


def test_int8_is_the_recipe_that_passes_the_lint(checkpoint, for_tensorrt, monkeypatch, tmp_path):
    exported = for_tensorrt("RepPoints")
    made = onnx.load(exported.path)
    monkeypatch.setattr(deploy.export, "to_onnx", lambda detector, spec: made)
    dataset = write_scenes(tmp_path / "data", exported.model, count=4)
    options = ["--target", "tensorrt", "--precision", "int8", "--dataset", str(dataset)]
    options += ["--images-root", str(dataset.with_name("images"))]
    # untrained weights lose more AP than a user would accept
    options += ["--calibration", str(dataset.with_name("others")), "--max-ap-drop", "40"]
    assert main([str(checkpoint), *options]) == 0
    folder = checkpoint.with_name("student_onnx")
    model = onnx.load(folder / "model.int8.onnx")
    assert lint(model) == []
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") > 20 and "Trilu" in kinds
    report = json.loads((folder / "report.json").read_text())
    assert report["precisions"]["int8"]["recipe"] == "tensorrt"
    assert "--stronglyTyped" in report["tensorrt"]["model.int8.onnx"]["commands"]["10"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dynamic", "image"], "--target tensorrt needs a fixed canvas"),
        (["--recipe", "onnx"], "--recipe onnx makes uint8, which TensorRT refuses"),
    ],
)
def test_contradictions_are_refused(checkpoint, options, message, capsys):
    assert main([str(checkpoint), "--target", "tensorrt", *options]) == 2
    assert message in capsys.readouterr().err
    assert not checkpoint.with_name("student_onnx").exists()


def test_the_target_is_written_into_the_file(for_tensorrt):
    model = onnx.load(for_tensorrt("RepPoints").path)
    inside = ModelSpec.from_metadata({p.key: p.value for p in model.metadata_props})
    assert inside.target == "tensorrt"
