"""The benchmark command on small graphs: what it reports, and what it refuses."""

import hashlib
import json
from collections import Counter

import onnx
import pytest
from PIL import Image

from deploy import benchmark
from deploy.runtime import OrtDetector
from deploy.speed import baselines
from deploy.speed.bench_rows import BASELINES, COMPILE, EAGER, GRAPH, LEGACY, SCRIPT
from deploy.speed.subgraph import network_only

from .coco_files import write_dataset
from .conftest import ARCHITECTURES
from .fake_graph import fake_spec, write_fake_graph

QUICK = ("--repeats", 3, "--warmup", 1, "--threads", 1)


def run(*args):
    return benchmark.main([str(arg) for arg in args])


def read(folder):
    return json.loads((folder / "benchmark.json").read_text())


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_report_of_two_graphs_without_checkpoint(model, tmp_path, capsys):
    other = tmp_path / "other.onnx"
    write_fake_graph(other, fake_spec(dynamic="none"), count=2)
    assert run(model, other, "--batch-sizes", 3, 1, *QUICK) == 0
    report = read(tmp_path)
    parts = ("", ", network only", ", from image")
    first, second = ([name + part for part in parts] for name in ("model.onnx", "other.onnx"))
    expected = [(1, name) for name in first + second] + [(3, name) for name in first]
    assert [(row["batch"], row["row"]) for row in report["rows"]] == expected
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] and row["repeats"] == 3
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"])
        (reference,) = (
            r for r in report["rows"] if r["row"] == "model.onnx" and r["batch"] == row["batch"]
        )
        assert row["to_first"] == pytest.approx(row["p50_ms"] / reference["p50_ms"])
        assert row["to_eager"] is None
        each = None if row["kind"] == "network" else 3 if "model" in row["row"] else 2
        assert row["found"] == (each and each * row["batch"])
    assert {entry["row"] for entry in report["left_out"]} == set(second)
    assert report["providers"] == ["CPUExecutionProvider"]
    assert (report["threads"], report["warmup"], report["repeats"]) == (1, 1, 3)
    for contender, path in zip(report["contenders"], (model, other), strict=True):
        assert contender["load_seconds"] > 0 and contender["first_seconds"] > 0
        assert contender["peak_mib"] >= contender["libraries_mib"] > 10
        assert contender["file_mib"] * 2**20 == path.stat().st_size and contender["ap"] is None
        assert contender["graph_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert contender["nodes"] == 13
    printed = capsys.readouterr().out
    assert "no checkpoint found" in printed and (tmp_path / "benchmark.md").read_text() in printed
    assert ("Noisy" in printed) == bool(report["noisy"])
    assert "other.onnx" in (tmp_path / "benchmark.html").read_text()


def test_both_engines_are_timed_in_one_run(model, tmp_path, capsys):
    engines = ("--engine", "onnxruntime", "--engine", "openvino")
    data = write_dataset(tmp_path / "data")
    assert run(model, *engines, "--batch-sizes", 2, "--dataset", data, *QUICK) == 0
    report = read(tmp_path)
    names = ["model.onnx", "model.onnx, OpenVINO"]
    parts = ("", ", network only", ", from image")
    assert [row["row"] for row in report["rows"]] == [n + part for n in names for part in parts]
    assert [row["found"] for row in report["rows"]] == [6, None, 6] * 2
    first, second = report["contenders"]
    assert [first["name"], second["name"]] == names and second["engine"].startswith("OpenVINO 20")
    assert first["ap"] == second["ap"] == pytest.approx({"AP": 100, "AP50": 100})
    assert second["peak_mib"] > second["libraries_mib"] > 10
    assert report["machine"]["versions"]["openvino"] in second["engine"]
    assert "| model.onnx, OpenVINO" in capsys.readouterr().out


def test_own_images_are_used_and_ap_is_measured(model, tmp_path):
    Image.new("RGB", (48, 64)).save(tmp_path / "a.png")
    data = write_dataset(tmp_path / "data")  # holds what the graph finds
    options = ("--images", tmp_path / "a.png", "--dataset", data, "--output", tmp_path / "out")
    assert run(model, *options, "--batch-sizes", 2, *QUICK) == 0
    report = read(tmp_path / "out")
    assert report["dataset"] == {"name": str(data), "images": 3}
    assert report["contenders"][0]["ap"] == pytest.approx({"AP": 100, "AP50": 100})
    assert report["rows"][0]["found"] == 6


def test_fixed_batch_leaves_larger_ones_out(tmp_path, capsys):
    write_fake_graph(tmp_path / "m.onnx", fake_spec(dynamic="none"))
    assert run(tmp_path / "m.onnx", *QUICK) == 0
    assert {row["batch"] for row in read(tmp_path)["rows"]} == {1}
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
        (("--dataset", "gone.json"), "gone.json"),
        (("--checkpoint", "gone.pth"), "gone.pth"),
        (("--baselines", "eager"), "--checkpoint"),
    ],
)
def test_bad_usage_is_one_line_exit_2_and_no_figures(model, options, message, capsys):
    assert run(model, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (model.parent / "benchmark.json").exists()


def test_a_graph_given_twice_is_refused(model, capsys):
    assert run(model, model.parent / "." / "model.onnx") == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arch, kinds", [("RetinaNet", (EAGER, LEGACY)), ("GeneralizedRCNN", (EAGER, SCRIPT, LEGACY))]
)
def test_the_student_is_timed_in_other_ways_beside_its_graph(exported, tmp_path, arch, kinds):
    student = exported(arch)
    options = ("--baselines", *kinds, "--batch-sizes", 1, 2, *QUICK, "--output", tmp_path)
    assert run(student.path, *options) == 0
    report = read(tmp_path)
    assert report["checkpoint"] == str(student.checkpoint)
    rows = {(row["kind"], row["batch"]): row for row in report["rows"]}
    assert {kind for kind, batch in rows if batch == 1} > {*kinds, GRAPH}
    assert {kind for kind, batch in rows if batch == 2} == {EAGER, GRAPH, "network", "client"}
    for batch in (1, 2):
        eager, graph = rows[EAGER, batch], rows[GRAPH, batch]
        assert eager["to_eager"] == 1 == graph["to_first"]
        assert graph["to_eager"] == pytest.approx(graph["p50_ms"] / eager["p50_ms"])
    found = {kind: rows[kind, 1]["found"] for kind in (*kinds, GRAPH)}
    assert len(set(found.values())) == 1, "they are not the same detector"
    assert found[GRAPH] > 5, "vacuous: post-processing had nothing to do"
    contenders = {contender["kind"]: contender for contender in report["contenders"]}
    assert contenders[LEGACY]["nodes"] > contenders[GRAPH]["nodes"]
    assert contenders[EAGER]["peak_mib"] > contenders[GRAPH]["peak_mib"] > 10


def test_a_baseline_that_cannot_run_is_a_remark(exported, tmp_path, monkeypatch):
    def untraceable(*_):
        raise RuntimeError("no <op> for it\nand much more")

    monkeypatch.setattr(baselines, "trace", untraceable)
    monkeypatch.setattr(benchmark, "BASELINES", {LEGACY: BASELINES[LEGACY]})
    assert run(exported("RetinaNet").path, "--batch-sizes", 1, *QUICK, "--output", tmp_path) == 0
    report = read(tmp_path)
    assert report["left_out"] == [{"row": BASELINES[LEGACY], "reason": "no <op> for it"}]
    assert {row["kind"] for row in report["rows"]} == {GRAPH, "network", "client"}
    assert "no &lt;op&gt; for it" in (tmp_path / "benchmark.html").read_text()


def test_a_baseline_asked_for_must_run(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options = ("--baselines", COMPILE, "--batch-sizes", 1, *QUICK, "--output", tmp_path)
    assert run(exported("RetinaNet").path, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "torch.compile cannot run" in line and "no-such-compiler" in line
    assert not (tmp_path / "benchmark.json").exists()


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
