"""The matrix on two architectures and two columns, with one cell made to fail."""

import json

import onnx
import pytest
from detectron2.modeling import build_model

import deploy.export
from deploy import matrix
from deploy.checks.tiny import TINY, tiny_cfg
from deploy.graphs import EXPORTABLE, exportable_class
from deploy.graphs.convert import to_onnx

from .test_verification import change


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """The command's exit code and its JSON. Dynamic batch is the session's graph of the same
    weights, which spares the conversion; `fault` is planted in FCOS's static graph."""

    paths = {"FCOS": tiny("FCOS").path, "GeneralizedRCNN": tiny("Mask R-CNN").path}

    def go(fault, *options):
        def convert(detector, spec):
            if spec.dynamic == "batch":
                return onnx.load(paths[spec.architecture])
            model = to_onnx(detector, spec)
            if spec.architecture == "FCOS":
                fault(model)
            return model

        monkeypatch.setattr(deploy.export, "to_onnx", convert)
        code = matrix.main(["--output", str(tmp_path), *options])
        return code, json.loads((tmp_path / "matrix.json").read_text())

    return go


def mean_off_by_one(model):
    change(model, "student.pixel_mean", lambda mean: mean + 1)


TWO = ("--architectures", "Mask R-CNN", "FCOS", "--columns", "static", "dynamic batch")


def test_a_cell_is_yes_only_if_it_was_verified(run, tmp_path, capsys):
    code, found = run(mean_off_by_one, *TWO)
    assert code == 0
    outcomes = {name: [c["outcome"] for c in row.values()] for name, row in found["rows"].items()}
    assert outcomes == {"Mask R-CNN": ["yes", "yes"], "FCOS": ["failed", "yes"]}
    masks_cell = found["rows"]["Mask R-CNN"]["static"]
    masks = masks_cell["verification"]
    assert masks["matched"] == masks["expected"] > 200 and masks["mask_error"] < 1e-3
    assert found["rows"]["FCOS"]["static"]["reason"].startswith("the graph differs: ")
    text = (tmp_path / "matrix.md").read_text()
    assert "| | static | dynamic batch |\n| --- | --- | --- |\n| Mask R-CNN | yes | yes |" in text
    assert "| FCOS | failed | yes |" in text and "- FCOS, static: failed: the graph differs" in text
    assert text in capsys.readouterr().out and "torch" in text
    (line,) = [line for line in text.splitlines() if line.startswith("- yes: in ONNX Runtime ")]
    assert " and in OpenVINO 20" in line and len(masks_cell["engines"]) == 2
    for name, column in (("mask_r_cnn", "static"), ("fcos", "dynamic_batch")):
        shape = onnx.load(tmp_path / name / column / "model.onnx").graph.input[0].type.tensor_type
        assert bool(shape.shape.dim[0].dim_param) == (column == "dynamic_batch")
    assert (tmp_path / "fcos" / "static" / "model.failed.onnx").exists()
    assert "matched" in (tmp_path / "fcos" / "static" / "log.txt").read_text()


def test_a_crash_costs_one_cell_and_the_exit_code(run, monkeypatch):
    def crash(model):
        raise RuntimeError("of the exporter\nitself")

    def refuse(dataset):
        assert len(json.loads(dataset.read_text())["annotations"]) > 50
        assert len(list(dataset.with_name("others").iterdir())) == 12
        return {"size": (100, 128)}

    monkeypatch.setitem(matrix.COLUMNS, "dynamic batch", refuse)
    options = ("--architectures", "FCOS", "--columns", "static", "dynamic batch")
    code, found = run(crash, *options)
    assert code == 1
    cells = found["rows"]["FCOS"]
    assert cells["static"]["outcome"] == "crashed"
    assert cells["static"]["reason"] == "RuntimeError: of the exporter itself"
    assert cells["dynamic batch"]["outcome"] == "refused"
    assert "multiples of 32" in cells["dynamic batch"]["reason"]


def test_every_exportable_class_has_a_row():
    classes = {exportable_class(build_model(tiny_cfg(name))) for name in TINY}
    assert set(EXPORTABLE.values()) <= classes
