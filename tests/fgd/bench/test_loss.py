import json
from dataclasses import asdict

import pytest
import torch

from fgd.bench import loss
from fgd.bench.__main__ import main
from fgd.bench.cases import draw_boxes, draw_maps
from fgd.bench.loss import Call, Settings, build, check_agreement, implementations, measure

CPU = torch.device("cpu")
NAMES = ["per box", "composed", "torch"]
TINY = Settings("rcnn", size=(48, 64), batch=1, channels=4, boxes=(1, 3), rounds=2, dtype="float64")


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(loss, "COPIED_BYTES", 2**20)


@pytest.fixture(scope="module")
def run():
    return measure(TINY, load=0.0)


def calls_of(settings, methods=None):
    shape = settings.size, settings.batch, settings.channels
    maps = draw_maps(settings.pyramid, *shape, torch.float64, CPU)
    boxes = draw_boxes(3, *shape[:2])
    methods = methods or build(settings, CPU)
    return {(name, 3): Call(m, maps, boxes, settings.size) for name, m in methods.items()}


def test_a_row_for_each_implementation_and_number_of_boxes(run):
    assert [(row["boxes"], row["implementation"]) for row in run["rows"]] == [
        (boxes, name) for boxes in (1, 3) for name in NAMES
    ]
    assert run["settings"] == asdict(TINY)
    cells = 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2
    assert run["unit_bytes"] == cells * 4 * 8
    assert 0 < run["difference"] < 1e-6  # masks are float32 in the package's loss
    json.dumps(run, allow_nan=False)


def test_ratios_fit_the_times_they_come_from(run):
    by_key = {(row["implementation"], row["boxes"]): row for row in run["rows"]}
    for (name, boxes), row in by_key.items():
        assert len(row["rounds_ms"]) == TINY.rounds
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        pairs = {
            "speedup": (by_key["per box", boxes], row),
            "over_fewest": (row, by_key[name, 1]),
        }
        for key, (over, under) in pairs.items():
            ratios = [a / b for a, b in zip(over["rounds_ms"], under["rounds_ms"], strict=True)]
            assert row[key] == pytest.approx(sum(ratios) / 2)  # the median of two
    assert run["floor_ms"] == pytest.approx(
        5 * run["unit_bytes"] / run["copy_gb_per_s"] / 1e6, rel=0.5
    )


def test_memory_in_units_of_the_students_maps(run):
    for row in run["rows"]:
        assert row["peak_u"] > 1, "the gradient alone is 1"
        assert 0 < row["held_u"] < row["peak_u"]
    baseline, *others = run["rows"][: len(NAMES)]
    # Authors' arrangement: masked features, their products, attention, contexts.
    assert baseline["held_u"] > 5
    assert all(row["held_u"] < baseline["held_u"] for row in others)


def test_all_have_the_same_parameters_and_gradients_are_dropped():
    methods = build(TINY, CPU)
    first, *others = (method.state_dict() for method in methods.values())
    assert any(key.endswith("transform.3.weight") and first[key].any() for key in first)
    for other in others:
        assert all(torch.equal(other[key], first[key]) for key in first)
    (call, *_) = calls_of(TINY, methods).values()
    call()
    owned = [*call.maps.student.values(), *call.method.parameters()]
    assert all(tensor.grad is not None for tensor in owned)
    call.reset()
    assert all(tensor.grad is None for tensor in owned)


def test_kernels_are_measured_where_there_is_cuda(monkeypatch):
    assert list(implementations("cpu")) == NAMES
    monkeypatch.setattr(loss, "find_spec", lambda name: object())
    assert list(implementations("cuda:0")) == [*NAMES, "triton"]
    monkeypatch.setattr(loss, "find_spec", lambda name: None)
    assert list(implementations("cuda")) == NAMES


def test_an_implementation_that_differs_is_not_timed():
    calls = calls_of(TINY)
    assert check_agreement(NAMES, calls, 3) < 1e-6
    wrong = calls[NAMES[-1], 3].method
    with torch.no_grad():
        wrong.levels["p3"].context_student.transform[-1].bias.add_(1.0)
    with pytest.raises(RuntimeError, match=f"'{NAMES[-1]}' differs from 'per box' by"):
        check_agreement(NAMES, calls, 3)


def test_the_command_writes_table_json_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loss, "allocators", lambda device: ("kept",))  # one process is enough
    options = "--size 48 64 --batch 1 --channels 4 --boxes 3 1 --rounds 2 --threads 1"
    options += f" --device cpu --pyramids retinanet --output {tmp_path}"
    assert main(["loss", *options.split()]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "loss.json").read_text())
    assert report["allocators"]["kept"] and "default" in report["allocators"]
    assert report["machine"]["versions"]["torch"]
    assert [run["allocator"] for run in report["runs"]] == ["kept"]
    for run in report["runs"]:
        assert run["settings"]["boxes"] == [1, 3] and len(run["goals"]) == 4
        for goal in run["goals"]:
            assert f"goal: {goal['line']}" in printed
        assert all(reason in printed for reason in run["noise"])
    assert printed.count("| per box") == 2 * len(report["runs"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [(["--device", "abacus"], "abacus"), (["--output", "/dev/null/x"], "cannot write there")],
)
def test_wrong_use_is_exit_code_2(options, message, capsys):
    assert main(["loss", *options]) == 2
    assert message in capsys.readouterr().err


def test_numbers_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["loss", "--boxes", "0"])
    assert "0 is not at least 1" in capsys.readouterr().err
