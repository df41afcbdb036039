"""The Triton repository: what it says is what the graph is, and it appears whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from deploy.serving.triton_model import _tensors
from deploy.spec import ModelSpec
from deploy.triton_repository import main

from .fake_graph import CLASSES, fake_spec, write_fake_graph
from .triton_server import DATA_TYPES, KINDS, read_config

ROOT = Path(__file__).parents[2]
ORT_TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_UINT8": "tensor(uint8)"}
ORT_TYPES["TYPE_INT32"] = "tensor(int32)"
OTHERS = ("detector/config.pbtxt", "detector/labels.txt")
ANY_SIZE = {"dynamic": "image", "height": None, "width": None}


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run(*args):
    return main([str(arg) for arg in args])


def files(folder):
    """Path in the folder -> content of each file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "changes", [{}, {"input_dtype": "uint8"}, ANY_SIZE, {"dynamic": "none"}], ids=str
)
def test_config_agrees_with_the_graph(tmp_path, changes):
    spec = write_fake_graph(tmp_path / "m.onnx", fake_spec(**changes))
    assert run(tmp_path / "m.onnx", tmp_path / "repo", "--name", "toy") == 0
    folder = tmp_path / "repo" / "toy"
    assert sorted(files(folder)) == ["1/model.onnx", "config.pbtxt", "labels.txt"]
    assert (folder / "1" / "model.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
    assert (folder / "labels.txt").read_text().splitlines() == list(CLASSES)
    config, session = read_config(folder), ort.InferenceSession(folder / "1" / "model.onnx")
    batched = spec.dynamic != "none"
    assert (config.name, config.backend) == ("toy", "onnxruntime")
    assert config.max_batch_size == (8 if batched else 0)
    assert config.HasField("dynamic_batching") == batched
    for tensors, values in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        for tensor, value in zip(tensors, values):
            assert ORT_TYPES[DATA_TYPES[tensor.data_type]] == value.type
            dims = [side if isinstance(side, int) else -1 for side in value.shape]
            assert list(tensor.dims) == (dims[1:] if batched else dims)
    labelled = {t.name: t.label_filename for t in config.output if t.label_filename}
    assert labelled == {"labels": "labels.txt"}


def test_masks_are_an_output_like_the_others():
    spec = fake_spec(task="instance_segmentation", mask_size=28)
    tensors = _tensors(spec)
    assert '{ name: "masks" data_type: TYPE_FP32 dims: [ 3, 28, 28 ] }' in tensors


def test_the_spec_in_the_config_is_the_graphs(tmp_path):
    """Whatever characters the class names have."""
    names = ["größe", 'quo"te\\', "tab\t{}"]
    spec = write_fake_graph(tmp_path / "m.onnx", fake_spec(classes=names, hashes={"a": "b"}))
    assert run(tmp_path / "m.onnx", tmp_path / "repo") == 0
    (entry,) = read_config(tmp_path / "repo" / "detector").parameters
    metadata = json.loads(entry.value.string_value)
    spec.hashes = {}
    assert (entry.key, ModelSpec.from_metadata(metadata)) == ("spec", spec)
    assert (tmp_path / "repo/detector/labels.txt").read_text().splitlines() == names


def test_options_reach_the_config(model, tmp_path):
    options = ("--max-batch-size", 1, "--instances", 3, "--device", "gpu")
    assert run(model, tmp_path / "repo", *options) == 0
    config = read_config(tmp_path / "repo" / "detector")
    (group,) = config.instance_group
    assert (group.count, KINDS[group.kind], config.max_batch_size) == (3, "KIND_GPU", 1)
    assert not config.HasField("dynamic_batching")


def test_a_version_is_not_replaced_unless_forced(model, tmp_path, capsys):
    repo = tmp_path / "repo"
    assert run(model, repo) == 0
    before = files(repo)
    write_fake_graph(model, fractions=[[0, 0, 1, 1]] * 3)
    assert run(model, repo) == 2 and files(repo) == before
    assert "detector has version 1; use another --version, or --force" in capsys.readouterr().err
    assert run(model, repo, "--version", 2, "--max-batch-size", 2) == 0
    assert "config.pbtxt: kept as it was" in capsys.readouterr().out
    after = files(repo)
    assert after == {**before, "detector/2/model.onnx": model.read_bytes()}
    assert run(model, repo, "--force", "--max-batch-size", 2) == 0
    assert files(repo)["detector/1/model.onnx"] == model.read_bytes()
    assert read_config(repo / "detector").max_batch_size == 2
    assert [path.name for path in repo.iterdir()] == ["detector"]


def test_a_tuned_config_is_kept_and_another_interface_refused(model, tmp_path, capsys):
    repo = tmp_path / "repo"
    assert run(model, repo) == 0
    config = repo / "detector" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 7"))
    assert run(model, repo, "--version", 2) == 0
    assert read_config(repo / "detector").instance_group[0].count == 7
    before = files(repo)
    write_fake_graph(model, fake_spec(classes=["other", "square", "triangle"]))
    for options in (("--version", 3), ("--version", 2, "--force")):
        assert run(model, repo, *options) == 2 and files(repo) == before
        assert "versions [1" in capsys.readouterr().err
    (repo / "detector" / "2" / "model.onnx").unlink()
    (repo / "detector" / "2").rmdir()
    assert run(model, repo) == 2 and "--force" in capsys.readouterr().err
    assert run(model, repo, "--force") == 0  # nothing else relies on the old interface
    assert (repo / "detector" / "labels.txt").read_text().startswith("other\n")
    assert files(repo)["detector/1/model.onnx"] == model.read_bytes()


@pytest.mark.parametrize(
    "changes, fits",
    [
        ({"precision": "fp16", "score_threshold": 0.3, "architecture": "FCOS"}, True),
        ({"classes": ["square", "circle", "triangle"]}, False),
        ({"input_format": "RGB"}, False),
        ({"input_dtype": "uint8"}, False),
        ({"min_size": 48}, False),
        ({"width": 128}, False),
    ],
    ids=str,
)
def test_versions_share_what_clients_rely_on(model, tmp_path, changes, fits, capsys):
    assert run(model, tmp_path / "repo") == 0
    write_fake_graph(model, fake_spec(**changes))
    assert run(model, tmp_path / "repo", "--version", 2) == (0 if fits else 2)
    assert ("use another --name" in capsys.readouterr().err) != fits


@pytest.mark.parametrize("there", ["nothing", "version 1"])
def test_a_full_disk_leaves_no_half_model(model, tmp_path, monkeypatch, there):
    """Whichever of the writes fails."""
    repo = tmp_path / "repo"
    if there != "nothing":
        assert run(model, repo) == 0
    before = files(repo) if repo.exists() else {}
    real, calls, failures = os.fsync, [], 0

    def fails_at(number):
        def fsync(descriptor):
            calls.append(descriptor)
            if len(calls) == number:
                raise OSError(28, "No space left on device")
            real(descriptor)

        return fsync

    for number in (1, 2, 3, 4):
        calls.clear()
        monkeypatch.setattr("os.fsync", fails_at(number))
        if run(model, repo, "--version", 2) == 0:
            break
        failures += 1
        assert files(repo) == before and not list(repo.glob(".*"))
    assert failures == (3 if there == "nothing" else 1)
    assert set(files(repo)) == {"detector/2/model.onnx", *OTHERS, *before}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--name", "../up"], "model name"),
        (["--name", ".hidden"], "model name"),
        (["--version", "0"], "--version is 0"),
        (["--max-batch-size", "0"], "expected 1 or more"),
        (["--instances", "0"], "--instances"),
    ],
)
def test_bad_usage_is_one_line(model, tmp_path, options, message, capsys):
    assert run(model, tmp_path / "repo", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "repo").exists()


def test_fixed_batch_cannot_be_batched(tmp_path, capsys):
    write_fake_graph(tmp_path / "m.onnx", fake_spec(dynamic="none"))
    assert run(tmp_path / "m.onnx", tmp_path / "repo", "--max-batch-size", 4) == 2
    assert "batch 1 fixed" in capsys.readouterr().err
    assert run(tmp_path / "m.onnx", tmp_path / "repo", "--max-batch-size", 0) == 0


def test_class_names_must_fit_a_line_each(tmp_path, capsys):
    write_fake_graph(tmp_path / "m.onnx", fake_spec(classes=["a", "b\nc", "d"]))
    assert run(tmp_path / "m.onnx", tmp_path / "repo") == 2
    assert "line break" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, tensor",
    [
        ({"max_detections": 5}, "boxes is float32 ['batch', 3, 4]"),
        ({"height": 96}, "images is float32 ['batch', 3, 64, 96]"),
        ({"dynamic": "none"}, "images is float32 ['batch', 3, 64, 96]"),
        (ANY_SIZE, "images is float32 ['batch', 3, 64, 96]"),
        ({"input_dtype": "uint8"}, "images is float32"),
        ({"task": "instance_segmentation", "mask_size": 28}, "has outputs ['num_dets'"),
    ],
    ids=str,
)
def test_a_graph_that_is_not_what_it_says_is_refused(model, tmp_path, changes, tensor, capsys):
    graph = onnx.load(model)
    onnx.helper.set_model_props(graph, fake_spec(**changes).to_metadata())
    onnx.save(graph, model)
    assert run(model, tmp_path / "repo") == 2
    assert tensor in capsys.readouterr().err and not (tmp_path / "repo").exists()


def test_typed_as_documented_from_another_folder(model, tmp_path):
    command = [sys.executable, ROOT / "deploy" / "triton_repository.py", "model.onnx", "repo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "repo" / "detector" / "1" / "model.onnx").is_file()
