import json

import pytest
import torch
from detectron2.modeling import build_model

from fgd.bench.__main__ import main
from fgd.bench.step import REST, STUDENT, TEACHER, WHOLE, TrainingStep, measure, table
from fgd.bench.workload import build_workload, draw_batch, norms_from_data
from fgd.errors import UserError

SIZE = (64, 96)


@pytest.fixture
def config(tiny_cfg, tmp_path):
    """Factory of a distillation config, its teacher's weights absent unless asked for."""

    def make(arch="RetinaNet", trained=False):
        teacher = tiny_cfg(arch, channels=24)
        (tmp_path / "teacher.yaml").write_text(teacher.dump())
        cfg = tiny_cfg(arch)
        cfg.MODEL.META_ARCHITECTURE = "Distiller"
        cfg.MODEL.DISTILLER.STUDENT = arch
        cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
        cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "https://example.org/never-fetched.pth"
        cfg.MODEL.WEIGHTS = ""
        if trained:
            path = tmp_path / "teacher.pth"
            torch.save({"model": build_model(teacher).state_dict()}, path)
            cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(path)
        return cfg

    return make


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_parts_and_teachers_of_a_step(arch, config):
    run = measure(config(arch), SIZE, batch=2, boxes=3, rounds=2, threads=1, load=0.0)
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
    run = measure(cfg, SIZE, batch=1, boxes=2, rounds=1, threads=1)
    assert run["random_weights"] == ["teacher", "student"]
    assert all(set(row["change"].values()) == {None} for row in run["teachers"])
    text = table(run)
    assert "TEACHER'S WEIGHTS ARE RANDOM" in text and "STUDENT'S WEIGHTS ARE RANDOM" in text
    assert cfg.MODEL.DISTILLER.TEACHER.WEIGHTS.startswith("https://")  # the caller's is untouched


def test_a_teacher_from_a_file_is_the_one_that_is_measured(config):
    cfg = config(trained=True)
    cfg.MODEL.DISTILLER.TEACHER.PRECISION = "bfloat16"
    cfg.MODEL.DISTILLER.FGD.RELATION_WEIGHT = 0.0
    run = measure(cfg, SIZE, batch=1, boxes=2, rounds=1, threads=1)
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


def test_random_networks_are_normalised_by_their_own_data(tiny_cfg):
    model = build_model(tiny_cfg())
    inputs = draw_batch(SIZE, 2, 2, classes=3)
    images = model.preprocess_image(inputs).tensor
    norms = {n: m for n, m in model.backbone.named_modules() if hasattr(m, "running_var")}
    before = {name: norm.running_var.clone() for name, norm in norms.items()}
    model.eval()
    with torch.no_grad(), norms_from_data(model.backbone):
        model.backbone(images)
    assert norms and not any(torch.equal(norms[k].running_var, before[k]) for k in norms)
    seen = []
    first = next(iter(norms.values()))
    first.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model.backbone(images)
    torch.testing.assert_close(first.running_mean, seen[0].mean(dim=(0, 2, 3)))
    spread = seen[0].var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(first.running_var, spread)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MODEL.META_ARCHITECTURE": "RetinaNet"}, "needs a distillation config"),
        ({"MODEL.DISTILLER.METHOD": ""}, "needs a distillation config"),
        ({"MODEL.MASK_ON": True}, "MASK_ON"),
        ({"MODEL.DISTILLER.TEACHER.CONFIG_FILE": ""}, "CONFIG_FILE"),
        ({"MODEL.DISTILLER.TEACHER.WEIGHTS": "nowhere.pth"}, "nowhere.pth"),
        ({"MODEL.DISTILLER.TEACHER.PRECISION": "float16"}, "needs CUDA"),
    ],
)
def test_what_cannot_be_measured(config, changes, message):
    cfg = config()
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    with pytest.raises(UserError, match=message):
        build_workload(cfg, SIZE, 1, 1)


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


def test_what_is_measured_distils_whatever_the_schedule(config):
    cfg = config()
    cfg.MODEL.DISTILLER.STUDENT, cfg.MODEL.FCOS.NUM_CLASSES = "FCOS", 1
    cfg.MODEL.DISTILLER.FACTOR = 0.5
    cfg.MODEL.DISTILLER.SCHEDULE.update(START=10, WARMUP_ITERS=10)
    work = build_workload(cfg, SIZE, batch=1, boxes=2)
    assert work.distiller.schedule.value(0) == 0.5
    assert work.batch[0]["instances"].gt_classes.tolist() == [0, 0]  # of the student's classes
    assert cfg.MODEL.DISTILLER.SCHEDULE.START == 10  # the caller's is untouched
    levels = work.distiller.sources.keys()
    assert all(teacher.sources.keys() == levels for teacher in work.teachers.values())
