import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import deploy.export
from deploy.checks.verify_images import draw_scene
from deploy.export import main
from deploy.graphs import exportable
from deploy.graphs.convert import to_onnx
from deploy.load import load_student
from deploy.make_spec import make_spec
from deploy.spec import ModelSpec

from .conftest import (
    ARCHITECTURES,
    CANVAS,
    CLASSES,
    conditioned,
    save_checkpoint,
    toy_cfg,
)
from .test_verification import change

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(exported, tmp_path):
    """A copy of the exported RetinaNet's checkpoint in a folder of its own."""
    path = tmp_path / "student.pth"
    path.write_bytes(exported("RetinaNet").checkpoint.read_bytes())
    return path


@pytest.fixture
def converted(exported, monkeypatch):
    """Spares the conversion: `export` gets the session's graph, changed by `fault` if given."""

    def use(fault=None):
        model = onnx.load(exported("RetinaNet").path)
        if fault:
            fault(model)
        monkeypatch.setattr(deploy.export, "to_onnx", lambda detector, spec: copy.deepcopy(model))

    return use


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_bare_checkpoint_gives_three_files_that_agree(arch, exported):
    folder = exported(arch).folder
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.onnx", "report.json"]
    content = (folder / "model.onnx").read_bytes()
    spec = ModelSpec.from_json(folder / "model.json")
    assert spec.hashes["graph_sha256"] == hashlib.sha256(content).hexdigest()
    checkpoint = exported(arch).checkpoint.read_bytes()
    assert spec.hashes["checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert (spec.classes, spec.architecture, spec.opset) == (CLASSES, arch, 18)
    assert (spec.height, spec.width, spec.min_size, spec.max_size) == (*CANVAS, *CANVAS)
    model = onnx.load_from_string(content)
    inside = ModelSpec.from_metadata({p.key: p.value for p in model.metadata_props})
    del spec.hashes["graph_sha256"]
    assert inside == spec
    report = json.loads((folder / "report.json").read_text())
    assert report["verification"]["passed"] and report["graph"]["bytes"] == len(content)
    assert report["left_out"] == {"distiller": {"tensors": 1, "bytes": 140}}
    assert report["chain"] == {
        "teacher": "not recorded",  # as in files that older versions wrote
        "training_config": {"sha256": "not recorded"},
        "checkpoint": {"sha256": hashlib.sha256(checkpoint).hexdigest(), "iterations": None},
        "graph": {"sha256": hashlib.sha256(content).hexdigest()},
    }
    versions = report["versions"]
    assert report["ap"] is None and {"python", "torch"} <= versions.keys()
    # each engine that proved it, here and in model.json
    proofs = [report["verification"], *report["verification"]["others"]]
    engines = [proof["engine"] for proof in proofs]
    assert engines == [{"name": x, "version": versions[x]} for x in ("onnxruntime", "openvino")]
    assert all(proof["passed"] and proof["tally"]["matched"] > 100 for proof in proofs)
    proved = [f"ONNX Runtime {versions['onnxruntime']}", f"OpenVINO {versions['openvino']}"]
    assert json.loads((folder / "model.json").read_text())["verified_in"] == proved
    assert report["verification"]["explanation"].endswith(f", in {' and '.join(proved)}")
    errors = report["verification"]["raw_errors"]
    levels = "34567" if arch == "RetinaNet" else "23456"
    assert [n for n in errors if n.startswith("feat")] == [f"features.p{i}" for i in levels]
    assert all(0 <= e["graph"] < 1e-4 < e["scale"] for e in errors.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_file_tells_nothing_about_this_machine(arch, exported):
    content = exported(arch).path.read_bytes()
    for text in (str(ROOT), "site-packages", ".py", "stack_trace", str(Path.home())):
        assert text.encode() not in content, text


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_inputs_outputs_and_operators(arch, exported):
    model = onnx.load(exported(arch).path)

    def signature(values):
        return {
            v.name: (
                onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    assert signature(model.graph.input) == {
        "images": ("float32", ["batch", 3, *CANVAS]),
        "image_sizes": ("int32", ["batch", 2]),
    }
    assert signature(model.graph.output) == {
        "num_dets": ("int32", ["batch", 1]),
        "boxes": ("float32", ["batch", 100, 4]),
        "scores": ("float32", ["batch", 100]),
        "labels": ("int32", ["batch", 100]),
    }
    interface = json.loads((exported(arch).folder / "model.json").read_text())["interface"]
    for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        told = {name: (t["dtype"], t["shape"]) for name, t in interface[kind].items()}
        assert told == signature(values)
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"If", "Loop", "Scan", "SequenceAt", "BatchNormalization"}
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    ratios = [a.i for n in model.graph.node for a in n.attribute if a.name == "sampling_ratio"]
    assert ratios == ([] if arch == "RetinaNet" else [0] * 4)


def test_dynamic_inputs(dynamic_retinanet):
    images = onnx.load(dynamic_retinanet.path).graph.input[0].type.tensor_type
    assert images.elem_type == onnx.TensorProto.UINT8
    assert [bool(d.dim_param) for d in images.shape.dim] == [True, False, True, True]
    assert (dynamic_retinanet.spec.height, dynamic_retinanet.spec.dynamic) == (None, "image")


def test_exporting_twice_gives_the_same_bytes(dynamic_retinanet):
    student = load_student(dynamic_retinanet.checkpoint)
    detector = exportable(student.model)
    model = to_onnx(detector, make_spec(student, detector, None, "image", "uint8"))
    assert model.SerializeToString(deterministic=True) == dynamic_retinanet.path.read_bytes()


def test_fixed_batch_size_threshold_and_images(tmp_path):
    """--dynamic none with all the other options."""
    cfg = toy_cfg("RetinaNet")
    checkpoint = save_checkpoint(conditioned(cfg), cfg, tmp_path / "a.pth", config=None)
    (tmp_path / "my.yaml").write_text(cfg.dump())
    (tmp_path / "photos").mkdir()
    for i in range(2):
        pixels = draw_scene(np.random.default_rng(i), (70, 90))
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    options = "--dynamic none --size 64 96 --score-threshold 0.2"
    options = [*options.split(), "--config-file", tmp_path / "my.yaml"]
    options += ["--output", tmp_path / "out", "--images", tmp_path / "photos"]
    options += ["--engine", "openvino"]
    assert main([str(x) for x in (checkpoint, *options)]) == 0
    spec = ModelSpec.from_json(tmp_path / "out" / "model.json")
    assert (spec.dynamic, spec.height, spec.width) == ("none", 64, 96)
    assert spec.score_threshold == 0.2
    shape = onnx.load(tmp_path / "out" / "model.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 3, 64, 96]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verification"]["images"] == 5 + 2
    assert report["verification"]["engine"]["name"] == "openvino"
    assert report["verification"]["others"] == []


def test_an_earlier_export_is_kept_unless_forced(checkpoint, converted, capsys, monkeypatch):
    converted()
    assert main([str(checkpoint)]) == 0
    assert capsys.readouterr().err == ""  # no bar, unless someone watches
    folder = checkpoint.with_name("student_onnx")
    before = (folder / "model.onnx").read_bytes()
    assert main([str(checkpoint)]) == 2
    assert "--force" in capsys.readouterr().err
    (folder / "model.failed.onnx").write_bytes(b"of an earlier attempt")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([str(checkpoint), "--force"]) == 0
    bar = f"\r[{'#' * 30}] 6/6 batches"
    shown = capsys.readouterr().err
    assert f"{bar} at score threshold 0.05\n" in shown and f"{bar}, raw predictions\n" in shown
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.onnx", "report.json"]
    assert (folder / "model.onnx").read_bytes() == before


def test_a_graph_over_the_gate_is_kept_only_as_failed(checkpoint, converted, capsys):
    converted()
    assert main([str(checkpoint)]) == 0
    converted(lambda model: change(model, "student.pixel_mean", lambda mean: mean + 1))
    assert main([str(checkpoint), "--force"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("error: the graph differs") and error.count("\n") == 1
    folder = checkpoint.with_name("student_onnx")
    assert sorted(p.name for p in folder.iterdir()) == ["model.failed.onnx", "report.json"]
    assert not json.loads((folder / "report.json").read_text())["verification"]["passed"]


def test_weights_of_somebody_else_are_found(checkpoint, converted, capsys):
    def add_teacher(model):
        tensor = numpy_helper.from_array(np.eye(9, dtype=np.float32) / 3, "teacher.weight")
        model.graph.initializer.append(tensor)

    converted(add_teacher)
    assert main([str(checkpoint)]) == 4
    assert "teacher.weight" in capsys.readouterr().err
    assert list(checkpoint.with_name("student_onnx").iterdir()) == []


@pytest.mark.parametrize(
    "options,message",
    [
        ("--size 100 128", "multiples of 32"),
        ("--size 0 128", "multiples of 32"),
        ("--size 96 128 --dynamic image", "choose one"),
        ("--score-threshold 1", "not in [0, 1)"),
        ("--config-file nowhere.yaml", "nowhere.yaml"),
        ("--images nowhere", "nowhere"),
    ],
)
def test_bad_options_end_with_one_line(options, message, checkpoint, capsys):
    assert main([str(checkpoint), *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not checkpoint.with_name("student_onnx").exists()


def test_the_script_itself_ends_with_one_line(tmp_path):
    """As typed, from another folder."""
    command = [sys.executable, ROOT / "deploy" / "export.py", "nothing.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: nothing.pth: no such checkpoint\n"
