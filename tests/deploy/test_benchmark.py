"""The benchmark command on a small graph: what it reports, and what it refuses."""

import hashlib
import json
from collections import Counter

import onnx
import pytest
from PIL import Image

from deploy import benchmark
from deploy.runtime import OrtDetector
from deploy.subgraph import network_only
from tests.deploy.conftest import ARCHITECTURES
from tests.deploy.fake_graph import fake_spec, write_fake_graph


def run(*args):
    return benchmark.main([str(arg) for arg in args])


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_report_of_a_graph_without_checkpoint(model, capsys):
    status = run(model, "--batch-sizes", 1, 3, "--repeats", 5, "--warmup", 1, "--threads", 1)
    assert status == 0
    report = json.loads((model.parent / "benchmark.json").read_text())
    expected = [(name, batch) for batch in (1, 3) for name in list(benchmark.ROWS)[1:]]
    assert [(row["row"], row["batch"]) for row in report["rows"]] == expected
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] and row["repeats"] == 5
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"])
        assert row["ratio"] == 1 or row["row"] != benchmark.GRAPH
    assert report["providers"] == ["CPUExecutionProvider"]
    assert (report["threads"], report["warmup"]) == (1, 1)
    assert report["input_sizes"] == ["64x96"] and report["detections_per_image"] == 3
    alone = report["processes"][benchmark.GRAPH]
    assert alone["load_seconds"] > 0 and alone["peak_mib"] >= alone["libraries_mib"] > 10
    assert report["file_mib"] * 2**20 == model.stat().st_size
    printed = capsys.readouterr().out
    assert "no checkpoint found" in printed and "network only" in printed
    assert ("NOISY" in printed) == bool(report["noisy"])


def test_own_images_are_used(model, tmp_path):
    Image.new("RGB", (48, 64)).save(tmp_path / "a.png")
    out = tmp_path / "b.json"
    options = ("--images", tmp_path / "a.png", "--batch-sizes", 2, "--repeats", 1, "--output", out)
    assert run(model, *options) == 0
    assert json.loads(out.read_text())["input_sizes"] == ["64x48"]


def test_fixed_batch_leaves_larger_ones_out(tmp_path, capsys):
    write_fake_graph(tmp_path / "m.onnx", fake_spec(dynamic="none"))
    assert run(tmp_path / "m.onnx", "--repeats", 1) == 0
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert {row["batch"] for row in report["rows"]} == {1}
    assert "exported with batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, {"dynamic": "image", "height": None, "width": None}])
def test_synthetic_images_fill_the_canvas(tmp_path, changes):
    spec = write_fake_graph(tmp_path / "m.onnx", fake_spec(**changes))
    images = benchmark.synthetic_images(spec, 2)
    assert (images[0] != images[1]).any()
    found = OrtDetector(tmp_path / "m.onnx").detect(images, 2)
    assert all(f.input_size in ((64, 96), (64, 85)) and not f.shrunk for f in found)


def test_checkpoint_is_found_only_where_the_export_left_it(tmp_path):
    folder, checkpoint = tmp_path / "model_final_onnx", tmp_path / "model_final.pth"
    checkpoint.write_bytes(b"weights")
    spec = fake_spec(hashes={"checkpoint_sha256": hashlib.sha256(b"weights").hexdigest()})
    find = benchmark.find_checkpoint
    assert find(folder / "model.onnx", spec) == checkpoint
    assert find(tmp_path / "other_onnx" / "model.onnx", spec) is None
    assert find(tmp_path / "model_final" / "model.onnx", spec) is None
    checkpoint.write_bytes(b"trained on")
    assert find(folder / "model.onnx", spec) is None


@pytest.mark.parametrize(
    "options, message",
    [
        (("--provider", "cuda"), "CUDAExecutionProvider"),
        (("--repeats", 0), "--repeats"),
        (("--threads", 0), "--threads"),
        (("--batch-sizes", 0, 2), "--batch-sizes"),
        (("--images", "gone.jpg"), "gone.jpg"),
        (("--checkpoint", "gone.pth"), "gone.pth"),
    ],
)
def test_bad_usage_is_one_line_exit_2_and_no_figures(model, options, message, capsys):
    assert run(model, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (model.parent / "benchmark.json").exists()


def test_detectron2_is_timed_beside_the_graph_it_was_exported_to(exported, tmp_path):
    student, out = exported("RetinaNet"), tmp_path / "b.json"
    options = ("--batch-sizes", 2, "--repeats", 3, "--warmup", 1, "--threads", 1, "--output", out)
    assert run(student.path, *options) == 0
    report = json.loads(out.read_text())
    assert [row["row"] for row in report["rows"]] == list(benchmark.ROWS)
    eager, graph, network, client = (row["p50_ms"] for row in report["rows"])
    assert report["rows"][0]["ratio"] == 1
    assert report["rows"][1]["ratio"] == pytest.approx(graph / eager)
    assert network < client
    assert report["checkpoint"] == str(student.checkpoint)
    assert report["detections_per_image"] > 5, "vacuous: post-processing had nothing to do"
    processes = report["processes"]
    assert processes[benchmark.EAGER]["peak_mib"] > processes[benchmark.GRAPH]["peak_mib"] > 10


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cut_leaves_the_final_selection_out(exported, arch):
    whole = onnx.load(exported(arch).path)
    cut = network_only(whole)
    counts = [Counter(node.op_type for node in part.graph.node) for part in (whole, cut)]
    for op in ("Conv", "Gemm", "MatMul", "RoiAlign"):
        assert counts[0][op] == counts[1][op]
    # a two-stage network needs its proposals, but not the detections selected at the end
    selections = {"RetinaNet": 0, "GeneralizedRCNN": 1}[arch]
    assert counts[1]["NonMaxSuppression"] == selections == counts[0]["NonMaxSuppression"] - 1
