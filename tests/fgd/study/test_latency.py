import hashlib
import json
from pathlib import Path

import pytest

from fgd.study.arms import study_config
from fgd.study.latency import latency
from fgd.study.pictures import latency_figure
from fgd.study.run import Run

from .finished import finish

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
MACHINE = {"cpu": "A CPU", "load_average": 0.1}


def arm_row(arm, ap):
    return {"arm": arm, "bbox": {"AP": {"mean": ap}}}


ROWS = [arm_row("teacher", 70.0), arm_row("student", 30.0), arm_row("FGD", 40.0)]


@pytest.fixture
def runs(tmp_path):
    found = [Run(arm, 0, CONFIG, tmp_path / arm, {}) for arm in ("teacher", "student", "FGD")]
    for run in found:
        finish(run)
        Path(run.weights).write_bytes(run.arm.encode())
    return found


def time(run, eager, graph, ap=None, threads=1, checkpoint=None):
    """What deploy's export and benchmark leave beside the checkpoint."""
    folder = run.folder / "model_final_onnx"
    folder.mkdir()
    digest = hashlib.sha256((checkpoint or run.arm).encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps({"hashes": {"checkpoint_sha256": digest}}))
    lines = [("Detectron2 eager", "eager", eager), ("model.onnx", "graph", graph)]
    found = {"machine": MACHINE, "threads": threads, "providers": ["CPU"]}
    found["noisy"] = ["p90 is up to 1.4 x p50"] * (eager == 20.0)
    found["rows"] = [
        {"row": name, "kind": kind, "batch": batch, "p50_ms": batch * ms}
        for batch in (1, 4)
        for name, kind, ms in (*lines, ("model.onnx, network only", "network", 1.0))
    ]
    found["contenders"] = [
        {"name": name, "kind": kind, "ap": {"AP": ap} if ap else None} for name, kind, _ in lines
    ]
    (folder / "benchmark.json").write_text(json.dumps(found))


def test_students_share_the_time_of_pytorch_and_graphs_have_their_own_ap(runs):
    time(runs[0], 20.0, 9.0)  # the AP of this graph was not measured
    time(runs[2], 5.0, 2.0, ap=39.9)
    found = latency(runs, ROWS, study_config(CONFIG, {}))
    assert [tuple(x.values()) for x in found["points"]] == [
        ("student", "PyTorch", 5.0, 30.0),
        ("FGD", "PyTorch", 5.0, 40.0),
        ("FGD, seed 0, model.onnx", "graph", 2.0, 39.9),
        ("teacher", "PyTorch", 20.0, 70.0),
    ]
    text, busy = found["text"]
    assert busy == "teacher was timed on a busy machine: p90 is up to 1.4 x p50"
    assert text.startswith('Median of one image, cpu A CPU, threads 1, providers ["CPU"], as ')
    (axis,) = latency_figure(found["points"]).axes
    assert [(line.get_label(), line.get_marker()) for line in axis.lines] == [
        *(("teacher, PyTorch", "o"), ("FGD, PyTorch", "o")),
        *(("FGD, seed 0, model.onnx", "^"), ("student, PyTorch", "o")),
    ]


def test_nothing_is_plotted_of_another_machine_checkpoint_or_file(runs):
    time(runs[0], 20.0, 9.0, threads=4)
    time(runs[1], 5.0, 2.0)
    time(runs[2], 6.0, 2.0, checkpoint="another")
    found = latency(runs, ROWS, study_config(CONFIG, {}))
    path = runs[2].folder / "model_final_onnx" / "benchmark.json"
    assert found["text"][1:3] == [
        f"Left out: {path} is of another checkpoint than {runs[2].weights}",
        'Left out: student, seed 0 was timed on cpu A CPU, threads 1, providers ["CPU"]',
    ]
    assert [x["name"] for x in found["points"]] == ["teacher"]
    path.write_text('{"machine": {}}')
    time_file = runs[2].folder / "model_final_onnx" / "model.json"
    digest = hashlib.sha256(b"FGD").hexdigest()
    time_file.write_text(json.dumps({"hashes": {"checkpoint_sha256": digest}}))
    text = latency(runs, ROWS, study_config(CONFIG, {}))["text"]
    assert text[1] == f"Left out: {path}: not as deploy's commands leave it (KeyError('cpu'))"


def test_without_figures_the_page_says_how_to_make_them(runs):
    cfg = study_config(CONFIG, {"DATASETS.JSON.TEST": "a b.json"})
    weights = runs[2].weights
    assert latency(runs, ROWS, cfg) == {
        "points": [],
        "text": [
            f"Not timed. python deploy/export.py {weights} and then python deploy/benchmark.py "
            f"{weights[:-4]}_onnx/model.onnx --dataset 'a b.json' write what --report shows here."
        ],
    }
    drawn = runs[2].folder / "shapes" / "test-1" / "annotations.json"
    drawn.parent.mkdir(parents=True)
    drawn.touch()
    (text,) = latency(runs, ROWS, study_config(CONFIG, {}))["text"]
    assert f"--dataset {drawn} write" in text
    assert latency([], [], cfg)["text"] == []
