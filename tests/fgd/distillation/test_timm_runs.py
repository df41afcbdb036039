"""A network of timm as the teacher, through the commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.utils.logger import setup_logger

from fgd.bench.step import Settings, measure
from fgd.cli import main as train_net
from fgd.config import load_config
from fgd.distillation import timm_teacher
from fgd.errors import UserError
from fgd.methods.fgd import FGD
from fgd.study.plan import plan
from fgd.visualize.__main__ import main as visualize
from fgd.weights import weights_sha256
from tests.fgd.doctor.clinic import student_cfg, write_config
from tests.fgd.training import assert_equal, taught_by_timm


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of four steps under a random network; OUTPUT_DIR beside."""
    folder = tmp_path_factory.mktemp("timm")
    cfg = taught_by_timm(student_cfg(folder), folder)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 4, (3,), 2
    cfg.DOCTOR.BATCHES = 1
    return write_config(cfg, folder / "timm.yaml")


@pytest.fixture(scope="module")
def run(config):
    """Folder of the finished run, begun with --balance."""
    code = train_net(["--config-file", str(config), "--balance"])
    setup_logger.cache_clear()
    assert code == 0
    return config.parent / "out"


def resume(run, folder, *options):
    """Continue a copy of the run from its second step; returns the exit code."""
    folder.mkdir()
    for name in ("model_0000001.pth", "config.yaml"):
        shutil.copy(run / name, folder)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    words = ["--config-file", str(folder / "config.yaml"), "--resume", "OUTPUT_DIR", str(folder)]
    code = train_net([*words, *options])
    setup_logger.cache_clear()
    return code


def test_the_doctor_checks_what_such_a_teacher_has(run):
    report = json.loads((run / "doctor.json").read_text())
    found = {x["name"]: x for x in report["findings"]}
    passed = ("weights", "formats", "levels", "frozen", "optimizer", "gradients", "quality")
    assert {found[name]["verdict"] for name in passed} == {"ok"}
    assert not {"teacher_classes", "channels"} & found.keys() and "teacher_ap50" not in report
    assert "2 of the file left out (head.bias, head.weight)" in found["weights"]["found"]
    assert found["levels"]["found"] == "p4 (16 channels) from tokens (64), stride 16"
    assert "teacher RGB, mean [127.5, 127.5, 127.5]" in found["formats"]["found"]
    assert found["quality"]["found"].startswith("test_vit is no detector")
    assert report["losses"]["factor"] == report["losses"]["suggested_factor"] != 1


def test_a_checkpoint_says_what_taught_and_holds_none_of_it(run):
    path = str(run.parent / "network.pth")
    final = torch.load(run / "model_final.pth", weights_only=True)
    assert final["teacher"] == {"weights": path, "sha256": weights_sha256(path)}
    assert not [name for name in (*final["model"], *final["distiller"]) if "blocks.0.attn" in name]


def test_a_resumed_run_is_bit_equal_wherever_the_file_lies(run, tmp_path):
    moved = tmp_path / "moved.pth"
    shutil.copy(run.parent / "network.pth", moved)
    options = ["MODEL.DISTILLER.TEACHER.WEIGHTS", str(moved)]
    assert resume(run, tmp_path / "second", *options) == 0
    ends = [
        torch.load(x / "model_final.pth", weights_only=True) for x in (run, tmp_path / "second")
    ]
    for end in ends:
        del end["full_config"], end["config"], end["teacher"]["weights"]
    assert_equal(*ends)


def test_other_weights_are_another_teacher(run, tmp_path, capfd):
    state = torch.load(run.parent / "network.pth", weights_only=True)
    state["norm.bias"][0] += 1
    other = str(tmp_path / "other.pth")
    torch.save(state, other)
    options = ["MODEL.DISTILLER.TEACHER.WEIGHTS", other]
    assert resume(run, tmp_path / "second", *options) == 2
    assert "content of the teacher's file: " in capfd.readouterr().err
    image = str(run.parent / "data" / "images" / "0.png")
    words = [str(run / "model_final.pth"), image, "--output", str(tmp_path / "maps")]
    assert visualize([*words, "--teacher", other]) == 2
    assert "is not the one that taught this student" in capfd.readouterr().err
    assert visualize(words) == 0 and (tmp_path / "maps" / "0.png").exists()


@pytest.mark.parametrize("weights", ["", "https://example.org/never-fetched.pth"])
def test_a_step_is_measured_without_a_download(config, weights):
    cfg = load_config(str(config), ["MODEL.DISTILLER.TEACHER.WEIGHTS", weights])
    run = measure(cfg, Settings((64, 64), batch=1, boxes=2, rounds=1, threads=1))
    assert run["random_weights"] == ["teacher", "student"] and len(run["teachers"]) == 4
    assert run["settings"]["teacher"] == "test_vit"
    assert set(run["teachers"][0]["change"]) == {f"fgd_{term}" for term in FGD.terms}


def test_a_study_does_not_evaluate_it_and_knows_no_gap(config, tmp_path):
    runs = plan(str(config), "", ["student", "distil"], [0], tmp_path, {})
    assert [x.arm for x in runs] == ["student", "distil"] and not runs[1].needs
    words = [word for pair in runs[1].opts.items() for word in pair]
    assert load_config(str(config), words).MODEL.DISTILLER.TEACHER.TIMM == "test_vit"
    empty = {"MODEL.DISTILLER.TEACHER.WEIGHTS": ""}  # timm's own
    assert len(plan(str(config), "", ["student", "distil"], [0], tmp_path, empty)) == 2
    for teacher, arms, message in (
        (
            "t.yaml",
            ["distil"],
            "--teacher t.yaml and MODEL.DISTILLER.TEACHER.TIMM test_vit are two",
        ),
        ("", ["student", "inherit+distil"], "--arms: inherit.distil: .* has no neck and no head"),
    ):
        with pytest.raises(UserError, match=message):
            plan(str(config), teacher, arms, [0], tmp_path, {})


def test_weights_that_cannot_be_had_end_the_run_in_one_line(config, tmp_path, capfd, monkeypatch):
    create = timm_teacher.create_model

    def fail(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no network")
        return create(name, **options)

    monkeypatch.setattr(timm_teacher, "create_model", fail)
    words = ["--config-file", str(config), "OUTPUT_DIR", str(tmp_path / "out")]
    assert train_net([*words, "MODEL.DISTILLER.TEACHER.WEIGHTS", ""]) == 2
    setup_logger.cache_clear()
    (line,) = capfd.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: MODEL.DISTILLER.TEACHER.TIMM: pretrained weights of 'test_vit'")
    assert "HF_HOME" in line and not list(Path(tmp_path / "out").glob("*.pth"))
