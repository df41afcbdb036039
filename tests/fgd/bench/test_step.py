import json

import numpy as np
import pytest
import torch

from fgd.bench.__main__ import main
from fgd.bench.per_method import TEACHER, Memory
from fgd.bench.step import REST, STUDENT, WHOLE, Settings, TrainingStep, measure, step_row
from fgd.bench.step_report import table
from fgd.bench.workload import build_workload
from fgd.timing import Times

from .conftest import KEPT

SIZE = (64, 96)


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_parts_and_teachers_of_a_step(arch, config):
    run = measure(config(arch), Settings(SIZE, batch=2, boxes=3, rounds=2, threads=1), load=0.0)
    parts = {part["part"]: part for part in run["parts"]}
    assert list(parts) == [STUDENT, TEACHER, REST, WHOLE]
    rounds = {name: part["rounds_ms"] for name, part in parts.items()}
    for student, teacher, rest, whole in zip(*rounds.values(), strict=True):
        assert student + teacher + rest == pytest.approx(whole)
    ratios = [w / (s + t) for s, t, w in zip(*(rounds[k] for k in (STUDENT, TEACHER, WHOLE)))]
    (goal,) = run["goals"]
    assert goal["value"] == pytest.approx(sum(ratios) / 2)
    assert goal["met"] == (goal["value"] <= 1.05)
    assert parts[WHOLE]["share"] == 1 and 0 < parts[TEACHER]["share"]
    peaks = {name: part["peak_bytes"] for name, part in parts.items()}
    assert peaks[REST] is None and peaks[TEACHER] < peaks[STUDENT] < peaks[WHOLE]
    names = [(row["precision"], row["channels_last"]) for row in run["teachers"]]
    assert names == [(p, last) for last in (False, True) for p in ("float32", "bfloat16")]
    assert run["teachers"][0]["over_float32"] == 1
    json.dumps(run, allow_nan=False)


def test_random_weights_are_said_aloud_and_their_rounding_is_not_reported(config):
    cfg = config()
    run = measure(cfg, Settings(SIZE, batch=1, boxes=2, rounds=1, threads=1))
    assert run["random_weights"] == ["teacher", "student"]
    assert all(set(row["change"].values()) == {None} for row in run["teachers"])
    text = table(run)
    assert "TEACHER'S WEIGHTS ARE RANDOM" in text and "STUDENT'S WEIGHTS ARE RANDOM" in text
    assert cfg.MODEL.DISTILLER.TEACHER.WEIGHTS.startswith("https://")  # the caller's is untouched


def test_a_teacher_from_a_file_is_the_one_that_is_measured(config):
    cfg = config(trained=True)
    cfg.MODEL.DISTILLER.TEACHER.PRECISION = "bfloat16"
    cfg.MODEL.DISTILLER.FGD.RELATION_WEIGHT = 0.0
    run = measure(cfg, Settings(SIZE, batch=1, boxes=2, rounds=1, threads=1))
    assert run["random_weights"] == ["student"] and "TEACHER'S" not in table(run)
    exact, half, last, _ = (row["change"] for row in run["teachers"])
    assert all(exact[f"fgd_{term}"] == 0 for term in ("foreground", "background", "attention"))
    assert exact["fgd_relation"] is None  # its weight is 0
    assert half["fgd_background"] != 0 and abs(last["fgd_background"]) < 1e-3
    assert run["parts"][1]["rounds_ms"] == run["teachers"][1]["rounds_ms"]  # the config's own


def test_a_step_trains_but_changes_no_weight(config):
    work = build_workload(config(trained=True), SIZE, 1, 2)
    step = TrainingStep(work.cfg, work.distiller, work.batch)
    before = {name: p.detach().clone() for name, p in work.distiller.named_parameters()}
    for _ in range(2):
        step()
    for name, parameter in work.distiller.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad.isfinite().all()
    body = work.distiller.student.backbone.bottom_up
    assert any(parameter.grad.any() for parameter in body.parameters())
    for name, value in work.student.state_dict().items():
        assert value.shape == work.distiller.student.state_dict()[name].shape


def test_the_command_writes_json_from_a_config_file(config, tmp_path, capsys):
    path = tmp_path / "fgd.yaml"
    path.write_text(config().dump())
    options = f"step --config-file {path} --size 64 96 --batch 1 --boxes 2 --rounds 1 --threads 1"
    options += f" --device cpu --output {tmp_path} MODEL.DISTILLER.INHERIT False"
    assert main(options.split()) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["goals"][0]["line"] in printed and "RANDOM" in printed
    assert report["settings"]["config"] == str(path) and report["machine"]["cpu"]


def test_errors_of_the_measuring_process_are_one_line(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fgd.bench.__main__.run_alone", lambda call, *args: call(*args))
    path = tmp_path / "fgd.yaml"
    path.write_text(config().dump())
    options = f"step --config-file {path} --device cpu --output {tmp_path} MODEL.MASK_ON True"
    assert main(options.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "MASK_ON" in error and "Traceback" not in error


HEADS = f"{TEACHER} with roi_heads"
# Seconds of the first round; the second takes twice as long.
PLANTED = {
    STUDENT: 10.0,
    TEACHER: 2.0,
    HEADS: 4.0,
    step_row("Maps"): 12.48,
    step_row("Logits"): 16.8,
    step_row("Alone"): 10.3,
    step_row("Trained"): 20.0,
    step_row("FGD"): 15.0,
}
NAMES = ("Maps", "Logits", "Alone", "Trained")


@pytest.fixture
def planted(monkeypatch):
    """Each row is called once and has its time of ``PLANTED``, else 1 s; the names of the rows."""
    names = []

    def alternate(rows, rounds, device):
        names.extend(rows)
        for call in rows.values():
            call()
        walls = {name: PLANTED.get(name, 1.0) * np.array([1.0, 2.0]) for name in rows}
        return {name: Times(wall, wall) for name, wall in walls.items()}

    monkeypatch.setattr("fgd.bench.step.alternate", alternate)
    return names


def test_what_each_method_adds(toys, config, planted):
    cfg = config("GeneralizedRCNN", trained=True)
    run = measure(cfg, Settings(SIZE, 1, 2, 2, 1, NAMES))
    assert sorted(planted) == sorted(PLANTED)
    rows = {row["method"]: row for row in run["methods"]}
    assert list(rows) == [*NAMES, "FGD"] and run["left_out"] == {}
    wanted = {
        "Maps": (1.04, 720.0, (1.05, True)),  # over 12 and 24 s
        "Logits": (1.2, 4200.0, (1.15, False)),  # over 14 and 28 s: with the teacher's heads
        "Alone": (1.03, 450.0, (1.05, True)),  # over the student alone
        "Trained": (20 / 12, 12000.0, None),
        "FGD": (1.25, 4500.0, (1.05, False)),
    }
    for name, (over_parts, added, goal) in wanted.items():
        row = rows[name]
        assert (row["over_parts"], row["added_ms"]) == pytest.approx((over_parts, added)), name
        assert (row["goal"] and (row["goal"]["bound"], row["goal"]["met"])) == goal, name
    assert run["goals"] == [row["goal"] for row in rows.values() if row["goal"]]
    assert [part["part"] for part in run["parts"]] == [STUDENT, TEACHER, HEADS]
    assert {part["share"] for part in run["parts"]} == {None}
    assert run["teachers"] == [] and run["over_parts"] is None
    json.dumps(run, allow_nan=False)
    check_memory(rows)
    text = table(run)
    assert all(goal["line"] in text for goal in run["goals"]) and "share of the whole" not in text


def check_memory(rows):
    """Of batch 1: p2 to p5 of 64x96 pixels, 16 channels; loss scalars are a few hundred bytes."""
    unit = (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3) * 16 * 4
    assert {name: row["unit_bytes"] for name, row in rows.items()} == {
        **dict.fromkeys(("Maps", "Trained", "FGD"), unit),
        **dict.fromkeys(("Logits", "Alone"), 0),
    }
    few = 2000
    assert abs(rows["Maps"]["held_bytes"]) < few  # a mean keeps no map, the teacher's neither
    for name in ("Alone", "Trained"):
        assert rows[name]["held_bytes"] == pytest.approx(4 * KEPT.numel(), abs=few)
    assert rows["FGD"]["held_bytes"] > 2.9 * unit  # 24 channels of the teacher, and aligned ones
    assert rows["Trained"]["held_u"] == rows["Trained"]["held_bytes"] / unit
    assert rows["Logits"]["held_u"] is rows["Alone"]["held_u"] is None
    counts = {name: row["parameters"] for name, row in rows.items()}
    assert counts == {"Maps": 0, "Logits": 0, "Alone": 3, "Trained": 25, "FGD": 6920}


def test_a_method_without_a_teacher_has_no_teacher_forward(toys, config, planted):
    cfg = config("GeneralizedRCNN")
    cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = ""
    cfg.MODEL.DISTILLER.METHOD = "Alone"
    run = measure(cfg, Settings(SIZE, 1, 2, 2, 1))
    assert planted == [STUDENT, step_row("Alone")]
    assert [part["part"] for part in run["parts"]] == [STUDENT, REST, WHOLE]
    assert run["parts"][1]["rounds_ms"] == pytest.approx([300.0, 600.0])
    assert run["over_parts"] == run["goals"][0]["value"] == pytest.approx(1.03)
    assert run["teachers"] == [] and run["random_weights"] == ["student"]
    assert run["left_out"]["FGD"].startswith("MODEL.DISTILLER.TEACHER: give WEIGHTS")
    text = table(run)
    assert "teacher none" in text and f"not beside them: FGD: {run['left_out']['FGD']}" in text


@pytest.mark.parametrize(
    "methods, asked, term, row",
    [
        (("Maps", "Logits"), None, None, None),
        (("Maps", "Logits"), True, "maps_distance", TEACHER),
        (("Logits",), None, "logits_distance", HEADS),
        (("Logits",), False, None, None),
        (("Alone", "Maps"), True, None, None),  # of the first, which has no teacher
    ],
)
def test_the_teachers_variants(toys, config, planted, monkeypatch, methods, asked, term, row):
    monkeypatch.setattr("fgd.bench.step.measure_memory", lambda *args: Memory(0, 0))
    run = measure(config("GeneralizedRCNN"), Settings(SIZE, 1, 2, 2, 1, methods, asked))
    assert len(run["teachers"]) == (4 if term else 0)
    for teacher in run["teachers"]:
        assert [*teacher["change"]] == [term]
    if methods == ("Logits",):  # one method, FGD beside it
        assert [part["part"] for part in run["parts"]] == [STUDENT, HEADS, REST, WHOLE]
        assert [row["method"] for row in run["methods"]] == ["Logits", "FGD"]
        assert run["over_parts"] == run["methods"][0]["over_parts"] == pytest.approx(1.2)
    if term:
        assert run["teachers"][0]["median_ms"] == pytest.approx(1500 * PLANTED[row])
        assert run["teachers"][1]["over_float32"] == pytest.approx(1 / PLANTED[row])


@pytest.mark.parametrize(
    "words, message",
    [
        ("Logits", "METHOD Logits needs RoI logits and box deltas of proposals"),
        ("Maps Nonsense", "'Nonsense' is unknown; there is"),
        ("Maps+Maps", "names a method twice"),
        ("Maps MODEL.DISTILLER.MAPS.DISTANCE_WEIGHT -1.0", "DISTANCE_WEIGHT: -1.0 is not"),
        ("Maps MODEL.NONSENSE 1", "MODEL.NONSENSE"),
    ],
)
def test_what_is_refused(toys, config, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr("fgd.bench.__main__.run_alone", lambda call, *args: call(*args))
    path = tmp_path / "distil.yaml"
    path.write_text(config().dump())
    options = f"step --config-file {path} --device cpu --output {tmp_path} --size 64 96 --batch 1"
    assert main([*options.split(), "--method", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "step.json").exists()
