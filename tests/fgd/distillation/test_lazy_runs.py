"""Teachers of the table and of trusted code, through the commands."""

import json
from functools import partial

import pytest
import torch
from detectron2.modeling import build_model

from fgd import cli
from fgd.config import load_config, student_config
from fgd.visualize.__main__ import main as visualize
from fgd.weights import weights_sha256
from tests.fgd.doctor.clinic import write_config
from tests.fgd.training import training_cfg

from .lazy_teachers import KEY, SQUARE, TINY, taught, trained

CODE = """
from tests.fgd.distillation.lazy_teachers import square_teacher
model = square_teacher()
"""


def write_run(folder, kind):
    """A config file of two steps under "lazy:<kind>"."""
    weights = str(folder / "teacher.pth")
    trained(kind, weights)
    fixed = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,), "DOCTOR.MIN_AP50", 0.0)
    cfg = training_cfg(folder, "RetinaNet", fixed)
    cfg.MODEL.DISTILLER.LEVELS = ["p3", "p4", "p5", "p6"]
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = SQUARE
    return write_config(taught(cfg, kind, weights), folder / "run.yaml")


@pytest.mark.parametrize("kind", TINY)
def test_a_trained_teacher_distils(kind, table, tmp_path):
    config = write_run(tmp_path, kind)
    assert cli.main(["--config-file", str(config)]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "doctor.json").read_text())
    found = {x["name"]: x for x in report["findings"]}
    passed = ("weights", "formats", "levels", "frozen", "optimizer", "gradients")
    assert {found[name]["verdict"] for name in passed} == {"ok"}
    assert found["teacher_classes"]["verdict"] != "fault" and "teacher_ap50" in report
    assert "teacher RGB, mean [1" in found["formats"]["found"]
    assert all(value > 0 for value in report["losses"]["distillation_at_factor_1"]["p3"].values())
    path = str(tmp_path / "teacher.pth")
    final = torch.load(out / "model_final.pth", weights_only=True)
    assert final["teacher"] == {"weights": path, "sha256": weights_sha256(path)}
    student = build_model(student_config(load_config(str(config))))
    assert final["model"].keys() == student.state_dict().keys()
    image = str(tmp_path / "data" / "images" / "0.png")
    assert visualize([str(out / "model_final.pth"), image, "--output", str(out)]) == 0


def test_errors_are_one_line_and_code_2(table, tmp_path, capfd):
    run = ["--config-file", str(write_run(tmp_path, "square"))]
    mine = tmp_path / "mine.py"
    mine.write_text("raise SystemError('executed')")
    trusted = ["--trust-config", str(mine)]
    for options, words, message in (
        ([], [KEY, "lazy:none"], f"error: {KEY} lazy:none: there is no such teacher; there are"),
        ([], [KEY, str(mine)], "Python code, which is executed only by train_net.py and if"),
        (trusted, [], f"error: --trust-config {mine}: {KEY} is 'lazy:square'; name the same file"),
        (trusted, [KEY, str(mine)], "mine.py: SystemError: executed"),
        ([], ["INPUT.MAX_SIZE_TRAIN", "256"], "error: INPUT.MAX_SIZE_TRAIN 256: the teacher pads"),
    ):
        assert cli.main([*run, *options, *words]) == 2
        error = capfd.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0] and "Traceback" not in error


def test_trusted_code_teaches_as_its_twin_in_the_table(table, tmp_path):
    run = ["--config-file", str(write_run(tmp_path, "square")), "SEED", "3"]
    mine = tmp_path / "mine.py"
    mine.write_text(CODE)
    assert cli.main([*run, "OUTPUT_DIR", str(tmp_path / "a")]) == 0
    words = ["--trust-config", str(mine), *run, KEY, str(mine), "OUTPUT_DIR", str(tmp_path / "b")]
    assert cli.main(words) == 0
    load = partial(torch.load, weights_only=True)
    ends = [load(tmp_path / x / "model_final.pth")["model"] for x in "ab"]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
