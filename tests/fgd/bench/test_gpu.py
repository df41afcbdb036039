"""The GPU run on a CPU, at tiny sizes: all parts once, and what happens when parts fail."""

import json
import math
import warnings
from concurrent.futures import TimeoutError as OutOfTime
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fgd.bench import gpu, gpu_numbers, gpu_report, gpu_syncs, gpu_training
from fgd.bench.__main__ import main
from fgd.bench.gpu_report import note, row
from fgd.methods.method import METHOD_REGISTRY

TINY = gpu.Settings("cpu", threads=1, tiny=True)
MACHINE = {"cpu": "Some CPU", "gpu": "NVIDIA X", "cuda": "12.8", "versions": {"torch": "2.11"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Everything in this process; of the methods, one for each pair."""
    folder = tmp_path_factory.mktemp("gpu")
    few = {"retinanet": ["PKD"], "rcnn": ["NKD"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "run_alone", lambda call, limit: call())
        patch.setattr(gpu, "_MOST", math.inf)
        patch.setattr(gpu_numbers, "methods_by_pyramid", lambda: few)
        words = "gpu --device cpu --threads 1 --budget 10000"
        code = main([*words.split(), "--output", str(folder)])
    names = sorted(path.name for path in folder.iterdir())
    page = (folder / "gpu.md").read_text()
    content = json.loads((folder / "gpu.json").read_text())
    return SimpleNamespace(code=code, names=names, page=page, **content)


def rows_of(run, title):
    (part,) = [part for part in run.parts if part["part"] == title]
    assert part["status"] == "ok", part["error"]
    return {x["what"]: x for x in part["rows"]}


def test_all_parts_run_and_are_written(run):
    assert run.code == 0 and run.names == ["gpu.json", "gpu.md"]
    titles = [part.title for part in gpu.PARTS if not part.only_cuda]
    assert [part["part"] for part in run.parts] == titles and len(titles) == 9
    assert run.tiny and "speeds mean nothing" in run.page
    assert all(title in run.page for title in titles) and run.machine["cpu"] in run.page


def test_numbers_are_compared_with_float64(run):
    kernels = rows_of(run, "kernels, torch")
    assert kernels["1x6x7x10 float64: map's gradient"]["value"] < 1e-12
    assert 0 < kernels["2x6x7x10 float32: terms"]["value"] < 1e-5
    rounded = kernels["2x6x7x10 bfloat16, channels last: map's gradient"]
    assert 1e-4 < rounded["value"] < rounded["at_most"] == 8e-3 and rounded["must"]
    methods = rows_of(run, "methods")
    assert len(methods) == 4 and all(0 < x["value"] < 1e-4 for x in methods.values())


def test_speeds_have_goals_that_are_no_errors(run):
    for title in ("loss, RetinaNet, float32, torch", "loss, R-CNN, float32, torch"):
        found = rows_of(run, title)
        floor = found["torch, 3 boxes: over the floor"]
        assert floor["at_most"] == 2 and floor["value"] > 2 and floor["met"] is False
        assert "per box, 3 boxes: over the floor" not in found
    for title in ("step, RetinaNet, float32", "step, R-CNN, float32"):
        found = rows_of(run, title)
        assert found["distillation step over student step + teacher"]["at_most"] == 1.05
        assert found["distillation step: peak, MiB"]["value"] > 1


def test_a_training_learns_and_goes_on(run):
    found = rows_of(run, "training")
    (total,) = [x for name, x in found.items() if name.startswith("total_loss")]
    assert 0 < total["value"] < 0.8 and total["must"]
    found = rows_of(run, "resume")
    assert found["resumed at"]["text"] == "iteration 2 of 4"
    assert found["resumed against uninterrupted"]["text"] == "bit-equal"
    waits = rows_of(run, "host waits")
    assert [x["value"] for x in waits.values() if x["at_most"] == 0] == [0, 0]


def good(settings):
    odd = {1: [float("nan"), np.float64(2)], "device": torch.device("cpu")}
    return {"measured": odd, "rows": [row("ms", 1.5), row("ratio", 1.2, 1.05), note("bits", "yes")]}


def wrong(settings):
    return {"rows": [row("error", 0.1, 1e-4, must=True)]}


def broken(settings):
    raise RuntimeError("CUDA error: an illegal\nmemory access")


def hanging(settings):
    raise OutOfTime


def measure(*functions, budget=1000.0):
    """The run of such parts, and what was saved of it after each."""
    saved = []
    parts = tuple(gpu.Part(function.__name__, function) for function in functions)
    save = lambda run: saved.append(json.loads(json.dumps(run, allow_nan=False)))  # noqa: E731
    return gpu.measure(TINY, MACHINE, budget, save, parts), saved


@pytest.fixture
def here(monkeypatch):
    """Parts run in this process."""
    monkeypatch.setattr(gpu, "run_alone", lambda call, limit: call())


def test_a_failing_part_loses_no_other(here):
    run, saved = measure(broken, hanging, good, wrong)
    assert [part["status"] for part in run["parts"]] == ["failed", "failed", "ok", "wrong"]
    assert [len(x["parts"]) for x in saved] == [1, 2, 3, 4]
    errors = [part["error"] for part in run["parts"]]
    assert errors[0] == "RuntimeError: CUDA error: an illegal memory access"
    assert errors[1] == "ended after 100 s"
    assert any("in broken" in line for line in run["parts"][0]["traceback"])
    assert run["parts"][2]["measured"] == {"1": [None, 2.0], "device": "cpu"}
    page = gpu_report.table(run)
    assert page.startswith("# NVIDIA X, CUDA 12.8, torch 2.11\n") and "speeds mean nothing" in page
    lines = [[x.strip() for x in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["broken", "", errors[0], "", "FAILED"] in lines
    assert ["good", "ratio", "1.2", "≤ 1.05", "missed"] in lines
    assert ["wrong", "error", "0.1", "≤ 0.0001", "WRONG"] in lines


def test_exit_codes(here):
    codes = {
        (good,): 0,
        (good, broken): 1,
        (hanging,): 1,
        (wrong, good): 4,
        (broken, wrong): 4,
    }
    for functions, code in codes.items():
        assert gpu_report.exit_code(measure(*functions)[0]["parts"]) == code


def test_a_used_up_budget_skips_the_rest(here, monkeypatch):
    clock = iter([0.0, 0.0, 0.0, 86.0, 86.0])  # good took 86 of 100 s
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run, _ = measure(good, wrong, budget=100.0)
    assert [part["status"] for part in run["parts"]] == ["ok", "skipped"]
    assert run["parts"][1]["error"] == "skipped: the budget of 100 s is used up"
    assert gpu_report.exit_code(run["parts"]) == 0
    assert "| skipped: the budget of 100 s is used up |" in gpu_report.table(run)


def test_a_part_that_the_budget_ends_is_no_fault(here):
    run, _ = measure(hanging, budget=50.0)
    assert run["parts"][0]["error"] == "ended after 50 s: the budget of 50 s is used up"
    assert run["parts"][0]["status"] == "skipped" and gpu_report.exit_code(run["parts"]) == 0


def test_figures_that_are_no_numbers():
    for value in (float("nan"), float("inf")):
        found = row("x", value, 1.0, must=True)
        assert found["value"] is None and found["met"] is False
        assert gpu_report.status_of([found]) == "wrong"
    assert row("x", None, 1.0, must=True)["met"] is None
    assert row("x", 1.0, 1.0)["met"] is True and row("x", 9.0)["met"] is None


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--output", str(tmp_path)]) == 2
    message = "error: --device is cuda, but PyTorch finds no GPU; add --device cpu\n"
    assert capsys.readouterr().err == message and not any(tmp_path.iterdir())


@pytest.mark.parametrize("term", range(4))
def test_a_wrong_term_is_noticed(term, monkeypatch):
    right = gpu_numbers.terms_function("torch")

    def altered(*args):
        found = right(*args)
        name = list(found)[term]
        return {**found, name: found[name] * 1.001}

    monkeypatch.setattr(gpu_numbers, "terms_function", lambda name: altered)
    unlike = [
        x["what"] for x in gpu_numbers.measure_kernels(TINY, "torch")["rows"] if x["met"] is False
    ]
    assert "1x6x7x10 float64: terms" in unlike
    assert "2x6x7x10 float32: map's gradient" in unlike


def test_every_method_has_a_pair():
    pairs = gpu_numbers.methods_by_pyramid()
    ours = {name for name, method in METHOD_REGISTRY if method.__module__.startswith("fgd.")}
    assert {*pairs["retinanet"], *pairs["rcnn"]} == ours
    assert "FGD" in pairs["retinanet"] and "FGD" in pairs["rcnn"] and "NKD" in pairs["rcnn"]


def test_waits_are_counted_from_the_second_call_on():
    calls = []

    def call():
        calls.append(1)
        warnings.warn("something else", stacklevel=1)
        for _ in range(len(calls)):
            warnings.warn("called a synchronizing CUDA operation (at copy.cu:1)", stacklevel=1)

    found = gpu_syncs.count(call, torch.device("cpu"))
    assert list(found.places.values()) == [2] and len(calls) == 2
    (place,) = found.places
    assert place.startswith("fgd/bench/test_gpu.py:") and found.callers == {place: set()}


def test_the_first_value_that_differs_is_named():
    one = {"model": {"a": torch.ones(2), "b": torch.zeros(3)}, "trainer": [1, {"lr": 0.1}]}
    assert gpu_training.first_difference(one, one) is None
    other = {"model": {"a": torch.ones(2), "b": torch.tensor([0, 0, 0.5])}, "trainer": [1, {}]}
    text = "trainer.1.lr is in one of them only"
    assert gpu_training.first_difference(one, other) == text
    other["trainer"] = [2, {"lr": 0.1}]
    text = "model.b differs by 5.0e-01; 2 of 4 values do"
    assert gpu_training.first_difference(one, other) == text
    text = "trainer.0 differs; 1 of 4 values do"
    other["model"]["b"] = torch.zeros(3)
    assert gpu_training.first_difference(one, other) == text
    other["trainer"], other["model"]["b"] = one["trainer"], torch.zeros(3).double()
    assert "model.b differs by 0.0e+00" in gpu_training.first_difference(one, other)


def test_a_run_that_differs_from_itself_excuses_an_unlike_resume():
    for ends, status in (
        ((None, None), "ok"),
        ((None, "unlike"), "wrong"),
        (("unlike", "unlike"), "ok"),
    ):
        rows = [note("resumed", "", *gpu_training._verdict(*ends))]
        assert gpu_report.status_of(rows) == status
