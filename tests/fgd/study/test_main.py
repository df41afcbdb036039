import json

import pytest

from fgd.config import load_config
from fgd.study.__main__ import main
from fgd.study.pictures import labelled_inputs
from tests.fgd.training import distilled, training_cfg


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A distillation config of two steps, with a teacher that is there."""
    folder = tmp_path_factory.mktemp("study")
    opts = ("SOLVER.MAX_ITER", 2, "DOCTOR.BRIEF", False)  # its teacher is random
    cfg = distilled(training_cfg(folder, opts=opts), folder)
    (folder / "fgd.yaml").write_text(cfg.dump())
    return folder / "fgd.yaml"


def test_a_study_from_beginning_to_end_with_a_run_that_fails(config_file, tmp_path, capsys):
    """The folder of one run is a file, so that it cannot start; the others go on."""
    (tmp_path / "inherit_0").write_text("in the way")
    words = ["--config-file", str(config_file), "--output", str(tmp_path)]
    words += ["--arms", "student,distil,inherit", "--resamples", "20"]
    assert main([*words, "--jobs", "3", "--threads", "1"]) == 2
    assert "FAILED: inherit, seed 0: " in capsys.readouterr().err
    study = json.loads((tmp_path / "study.json").read_text())
    assert [row["arm"] for row in study["arms"]] == ["teacher", "student", "distil"]
    assert [row["iterations"] for row in study["arms"]] == [None, 2, 2]
    (missing,) = study["missing"]
    assert missing.startswith("FAILED: inherit, seed 0: ") and "inherit_0" in missing
    names = [row["class"] for row in study["changes"]["bbox"]]
    assert names == ["all classes", "square", "disc", "cross"]
    page = (tmp_path / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # AP, losses, attention on two images
    assert "FAILED: inherit, seed 0" in page
    assert "distil against student, boxes" in (tmp_path / "study.md").read_text()

    # Damage costs what it concerns, no more; and --report trains nothing.
    (tmp_path / "student_0" / "inference" / "coco_instances_results.json").unlink()
    (tmp_path / "distil_0" / "model_final.pth").write_bytes(b"damaged")
    assert main([*words, "--report"]) == 0
    missing = json.loads((tmp_path / "study.json").read_text())["missing"]
    assert missing[0] == "inherit, seed 0: not run"
    assert missing[1].startswith("Changes between arms are not tested: student, seed 0: ")
    assert (
        missing[2].startswith("Distilled maps are not shown: ") and "model_final.pth" in missing[2]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,x"], "'0,x' is not numbers"),
        (["--seeds", "1,1"], "names a seed twice"),
        (["--arms", "magic"], "magic unknown"),
        (["SOLVER.MAX_ITER"], "pairs of KEY VALUE"),
        (["--report"], "no run has finished"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(config_file, tmp_path, capsys, words, message):
    assert main(["--config-file", str(config_file), "--output", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_test_images_are_mapped_at_the_size_of_the_test_without_a_flip(config_file):
    cfg = load_config(str(config_file), ["INPUT.MIN_SIZE_TEST", "32", "INPUT.MAX_SIZE_TEST", "48"])
    inputs = labelled_inputs(cfg, 2)
    assert [tuple(x["image"].shape[-2:]) for x in inputs] == [(32, 48), (48, 32)]
    first = inputs[0]["instances"].gt_boxes.tensor[0].tolist()
    assert first == [2, 3, 14, 18]  # [4, 6, 28, 36] of a picture of twice the size
    assert labelled_inputs(cfg, 0) == []
