"""The command, as typed: what it prints, and its exit codes."""

import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import deploy.verify
from deploy.graphs import exportable
from deploy.reexport import Reference
from deploy.verify import main

from .test_verification import change


@pytest.fixture
def converted(exported, monkeypatch):
    """Spares the conversion: the reference is the session's graph."""

    def reference(graph, student):
        made = exported("RetinaNet")
        model = onnx.load(made.path)
        return Reference(made.spec, exportable(made.model), model, model)

    monkeypatch.setattr(deploy.verify, "make_reference", reference)


def test_a_graph_equals_the_checkpoint_it_was_made_from(dynamic_retinanet, capsys):
    """Any canvas, uint8, batch norms per level; converted again, nothing spared. In the engine that
    is asked for; its export was verified in both.
    """
    files = str(dynamic_retinanet.path), str(dynamic_retinanet.checkpoint)
    assert main([*files, "--engine", "openvino"]) == 0
    out = capsys.readouterr().out
    assert "Detectron2's detections, in one engine, OpenVINO 20" in out and "Runtime" not in out
    assert "the one it was made from" in out and "box error (pixels)" in out
    assert "equal: the graph gives Detectron2's detections" in out
    total = len(onnx.load(dynamic_retinanet.path).graph.initializer)
    assert f"weights: {total} of {total} initializers are the checkpoint's" in out


def test_one_percent_is_caught_and_located(exported, converted, tmp_path, capsys):
    made, name = exported("RetinaNet"), "student.head.cls_score.weight"
    model = onnx.load(made.path)
    change(model, name, lambda weight: weight * 1.01)
    onnx.save(model, tmp_path / "model.onnx")
    assert main([str(tmp_path / "model.onnx"), str(made.checkpoint)]) == 4
    out, error = capsys.readouterr()
    assert error.endswith(f"1 initializer differs from the checkpoint's: {name}\n")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "the graph differs: in ONNX Runtime 1." in out  # the detections show it too
    assert f"{name}, read by Conv " in out and " values differ, by up to " in out


def test_a_change_too_small_for_the_detections_is_caught(exported, converted, tmp_path, capsys):
    """One value by a hundred thousandth: the table passes, the weights do not."""
    made, name = exported("RetinaNet"), "student.head.bbox_subnet.0.weight"
    model = onnx.load(made.path)

    def nudge(weight):
        weight[0, 0, 0, 0] *= 1.00001
        return weight

    change(model, name, nudge)
    onnx.save(model, tmp_path / "model.onnx")
    assert main([str(tmp_path / "model.onnx"), str(made.checkpoint)]) == 4
    out, error = capsys.readouterr()
    assert error.endswith(f"{name}\n") and "1 of 2,304 values differ" in out
    assert "FAIL" not in out


def test_a_sidecar_of_another_file_is_told_beside_the_rest(exported, converted, tmp_path, capsys):
    made = exported("RetinaNet")
    (tmp_path / "model.onnx").write_bytes(made.path.read_bytes())
    values = json.loads((made.folder / "model.json").read_text())
    values["hashes"]["graph_sha256"] = hashlib.sha256(b"").hexdigest()
    (tmp_path / "model.json").write_text(json.dumps(values))
    assert main([str(tmp_path / "model.onnx"), str(made.checkpoint)]) == 4
    out, error = capsys.readouterr()
    assert "model.json belongs to another file" in error and "equal: the graph gives" in out


def test_another_seed_is_called_different_weights(dynamic_retinanet, tmp_path, capsys):
    """The same student, trained otherwise."""
    content = torch.load(dynamic_retinanet.checkpoint, weights_only=True)
    torch.manual_seed(1)
    for name, value in content["model"].items():
        if name.endswith(("weight", "bias")):
            value.mul_(1 + 0.05 * torch.randn_like(value))
    torch.save(content, tmp_path / "other.pth")
    assert main([str(dynamic_retinanet.path), str(tmp_path / "other.pth")]) == 4
    out, error = capsys.readouterr()
    assert "different weights: " in error and "initializers differ" in error
    assert "it was made from " in out and " more\n" in out


@pytest.mark.parametrize(
    "model,checkpoint,options,message",
    [
        ("nothing.onnx", "student.pth", "", "cannot read model"),
        ("text.onnx", "student.pth", "", "is no ONNX model"),
        ("model.onnx", "nothing.pth", "", "no such checkpoint"),
        ("model.onnx", "text.onnx", "", "not a PyTorch file"),
        ("model.onnx", "student.pth", "--images nowhere", "nowhere"),
        ("model.onnx", "student.pth", "--config-file no.yaml", "no.yaml"),
        ("model.onnx", "student.pth", "--dataset test.json", "--dataset is for what a precision"),
        ("int8.onnx", "student.pth", "", "give --dataset"),
    ],
)
def test_bad_input_ends_with_one_line(
    model, checkpoint, options, message, exported, tmp_path, capsys
):
    made = exported("RetinaNet")
    graph = onnx.load(made.path)
    onnx.save(graph, tmp_path / "model.onnx")
    (precision,) = [entry for entry in graph.metadata_props if entry.key == "precision"]
    precision.value = "int8"
    onnx.save(graph, tmp_path / "int8.onnx")
    (tmp_path / "student.pth").write_bytes(made.checkpoint.read_bytes())
    (tmp_path / "text.onnx").write_text("no model")
    paths = [str(tmp_path / model), str(tmp_path / checkpoint)]
    assert main([*paths, *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def replaced(model, output, node_type, inputs, **attributes):
    """The graph with one output made by another node."""
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            node.output[i] = "real_" + name if name == output else name
        for i, name in enumerate(node.input):
            node.input[i] = "real_" + name if name == output else name
    for name, value in inputs.items():
        if value is not None:
            model.graph.initializer.append(numpy_helper.from_array(value, name))
    model.graph.node.append(helper.make_node(node_type, list(inputs), [output], **attributes))


def endless_loop():
    """The body of a Loop that goes on."""
    tensors = ("round", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("kept", 1, None)
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Abs", ["kept"], ["x"])]
    outputs = ("on", TensorProto.BOOL, []), ("x", 1, None)
    values = [[helper.make_tensor_value_info(*t) for t in some] for some in (tensors, outputs)]
    return helper.make_graph(nodes, "body", *values)


HOSTILE = {
    "num_dets": ("Mul", {"real_num_dets": None, "many": np.array(-1000, np.int32)}, {}),
    "scores": ("Mul", {"real_scores": None, "many": np.array(50, np.float32)}, {}),
    "labels": ("Add", {"real_labels": None, "many": np.array(99, np.int32)}, {}),
    "boxes": ("Mul", {"real_boxes": None, "many": np.array(np.nan, np.float32)}, {}),
    "boxes loop": (
        "Loop",
        {"rounds": np.array(2**62), "": None, "real_boxes": None},
        {"body": endless_loop()},
    ),
    "labels less": (
        "Slice",
        {"real_labels": None, "from": np.array([0]), "to": np.array([2]), "axis": np.array([1])},
        {},
    ),
}


MESSAGES = {
    "num_dets": "model.onnx gives what it never should: -",
    "scores": "1 initializers in the graph, but not the checkpoint's: many",
    "labels": "1 initializers in the graph, but not the checkpoint's: many",
    "boxes": "1 initializers in the graph, but not the checkpoint's: many",
    "boxes loop": "model.onnx ran for more than 2 s and was ended (--time-limit)",
    "labels less": "model.onnx gives what it never should: labels is int32 (1, 2), not int32 (1, ",
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_impossible_answers_are_one_line(fault, exported, converted, tmp_path, capsys):
    made, path = exported("RetinaNet"), tmp_path / "model.onnx"
    model = onnx.load(made.path)
    node_type, inputs, attributes = HOSTILE[fault]
    replaced(model, fault.split()[0], node_type, inputs, **attributes)
    onnx.save(model, path)
    assert main([str(path), str(made.checkpoint), "--time-limit", "2"]) in (2, 4)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert MESSAGES[fault] in error
