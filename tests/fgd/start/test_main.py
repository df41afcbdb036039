"""The command: from a JSON to configs that run, and one line for what a user can mend."""

import json
import os
import shlex

import pytest
import torch
from detectron2.modeling import build_model

from fgd import cli
from fgd.config import load_config
from fgd.errors import DivergedError
from fgd.files import atomic_write
from fgd.start import pace, recipe
from fgd.start.__main__ import main
from fgd.study import __main__ as study
from tests.fgd.doctor.clinic import write_colours

from .drawn import names_of, write_set

FILES = ["distil.yaml", "student.yaml", "teacher.yaml", "test.json", "train.json", "valid.json"]


@pytest.fixture
def paced(monkeypatch):
    """No step is taken: each takes 1, 3 and 2 seconds."""
    monkeypatch.setattr(pace, "measure", lambda folder, data: pace.Pace(1.0, 3.0, 2.0))


def start(path, output, *words):
    return main(["--train", str(path), "--output", str(output), "--from-scratch", *words])


def said(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").strip()


def test_from_a_json_to_configs_that_the_doctor_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pace, "STEPS", 1)
    monkeypatch.setattr(recipe, "_SCRATCH", ("mobilenetv3_small_050",) * 2)  # quick to build
    write_colours(tmp_path / "data")
    output = tmp_path / "my runs"
    assert start(tmp_path / "data" / "data.json", output, "--budget", "60") == 0
    text = capsys.readouterr().out
    assert sorted(os.listdir(output)) == FILES
    assert "train: 6 images of" in text and "test: 1 images of" in text
    assert "60 minutes the teacher gets half, 300 iterations" in text  # 200 rounds of 6 in fours
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("python -m ")]
    assert [words[2] for words in lines] == ["fgd.study", "deploy.export", "deploy.predict"]
    args = study.build_parser().parse_args(lines[0][3:])
    assert args.config_file == str(output / "distil.yaml") and args.select == "best"
    best = output / "study" / "inherit+FGD_0"
    assert lines[1][3:] == [str(best / "model_best.pth")]
    assert lines[2][3] == str(best / "model_best_onnx" / "model.onnx")
    (tested,) = names_of(output / "test.json")
    assert lines[2][4] == str(tmp_path / "data" / "images" / tested)

    teacher, weights = load_config(str(output / "teacher.yaml")), tmp_path / "teacher.pth"
    torch.save({"model": build_model(teacher).state_dict(), "config": teacher.dump()}, weights)
    words = ["--doctor", "--config-file", args.config_file, "MODEL.DISTILLER.TEACHER.WEIGHTS"]
    own = [
        "DOCTOR.MIN_AP50",
        "0",
        "DOCTOR.BATCHES",
        "1",
        "DOCTOR.IMAGES",
        "2",
        "OUTPUT_DIR",
        str(tmp_path / "doctor"),
    ]
    assert cli.main([*words, str(weights), *own]) == 0


def test_images_of_both_orientations_and_sets_that_are_given(tmp_path, paced, capsys):
    """A portrait among them: the canvas is a square. The image that the test set has too stays in
    the training set."""
    sizes = [(64, 96)] + [(96, 64)] * 7
    path = write_set(tmp_path / "data", sizes=sizes)
    content = json.loads(path.read_text())
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    (tmp_path / "data" / "test.json").write_text(json.dumps(content))
    given = str(tmp_path / "data" / "test.json")
    assert start(path, tmp_path / "out", "--test", given, "--budget", "30") == 0
    text = capsys.readouterr().out
    assert "fault: 1 training images are near duplicates of images of test" in text
    assert "canvas 96x96" in text and "model_best.pth --size 96 96" in text
    assert "test.json" not in os.listdir(tmp_path / "out")
    parts = [names_of(tmp_path / "out" / f"{part}.json") for part in ("train", "valid")]
    assert len(parts[0]) == 7 and len(parts[1]) == 1 and "0.png" in parts[0]
    cfg = load_config(str(tmp_path / "out" / "distil.yaml"))
    assert cfg.DATASETS.JSON.TEST == given
    assert cfg.DATASETS.JSON.VALID == str(tmp_path / "out" / "valid.json")
    assert cfg.SOLVER.MAX_ITER == 175  # 100 rounds of 7 in fours


def test_damaged_images_are_left_out(tmp_path, paced, capsys):
    path = write_set(tmp_path / "data")
    (tmp_path / "data" / "images" / "3.png").write_bytes(b"")
    assert start(path, tmp_path / "out") == 0
    assert "fault: 1 images cannot be used and are left out; the first: " in capsys.readouterr().out
    parts = [names_of(tmp_path / "out" / f"{part}.json") for part in ("train", "valid", "test")]
    assert sorted(sum(parts, [])) == [f"{i}.png" for i in range(8) if i != 3]


def test_nothing_is_overwritten(tmp_path, paced, capsys):
    path = write_set(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "teacher.yaml").write_text("mine")
    assert start(path, tmp_path / "out") == 2
    assert said(capsys) == (
        f"{tmp_path}/out/teacher.yaml is there, and nothing is overwritten; take another --output"
    )
    assert os.listdir(tmp_path / "out") == ["teacher.yaml"]


def test_without_memory_the_batch_is_halved(tmp_path, monkeypatch, capsys):
    batches = []

    def measure(folder, data):
        batches.append(load_config(str(folder / "student.yaml")).SOLVER.IMS_PER_BATCH)
        if batches[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pace.Pace(1.0, 3.0, 2.0)

    monkeypatch.setattr(pace, "measure", measure)
    path, limit = write_set(tmp_path / "data", sizes=[(64, 64)] * 12), 2
    assert start(path, tmp_path / "out") == 0 and batches == [8, 4, 2]
    assert load_config(str(tmp_path / "out" / "distil.yaml")).SOLVER.IMS_PER_BATCH == 2
    limit = 0
    assert start(path, tmp_path / "more") == 2
    assert said(capsys) == "cpu has no memory for a step of one image"
    assert os.listdir(tmp_path / "more") == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["--detector", "mask_rcnn"], "--detector mask_rcnn: dataset JSON"),
        (["--test", "none.json"], "none.json does not exist"),
        (["--budget", "0.1"], "--budget 0.1: too short for 10 iterations each; give "),
        (["--device", "gpu"], "--device: 'gpu' is not a device; use cuda or cpu"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_a_user_can_mend(words, message, tmp_path, paced, capsys):
    path = write_set(tmp_path / "data")
    assert start(path, tmp_path / "out", *words) == 2
    assert message in said(capsys)
    assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    "error, code, message",
    [
        (KeyboardInterrupt(), 130, "stopped; nothing was written\n"),
        (DivergedError("a loss is\nNaN"), 3, "error: a loss is NaN\n"),
    ],
)
def test_an_end_while_steps_are_timed(error, code, message, tmp_path, monkeypatch, capsys):
    def measure(folder, data):
        raise error

    monkeypatch.setattr(pace, "measure", measure)
    assert start(write_set(tmp_path / "data"), tmp_path / "out") == code
    assert capsys.readouterr().err == message and os.listdir(tmp_path / "out") == []


def test_a_disk_that_fills_leaves_nothing(tmp_path, paced, monkeypatch, capsys):
    def full(path, write):
        if path.endswith("teacher.yaml"):
            raise OSError(28, "No space left on device")
        atomic_write(path, write)

    monkeypatch.setattr("fgd.start.__main__.atomic_write", full)
    assert start(write_set(tmp_path / "data"), tmp_path / "out") == 2
    assert "No space left" in said(capsys) and os.listdir(tmp_path / "out") == []


def test_a_photo_whose_name_a_terminal_would_obey_is_not_typed(tmp_path, paced, capsys):
    path = write_set(tmp_path / "data")
    content = json.loads(path.read_text())
    for image in content["images"]:
        name = image["file_name"].replace(".", "\x1b[2J.")
        os.rename(tmp_path / "data/images" / image["file_name"], tmp_path / "data/images" / name)
        image["file_name"] = name
    path.write_text(json.dumps(content))
    assert start(path, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert f"model.onnx {tmp_path}/data/images --output" in text and "\x1b" not in text


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf", "x"])
def test_a_budget_is_a_number_of_minutes(budget, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        start(tmp_path / "a.json", tmp_path / "out", f"--budget={budget}")
    assert caught.value.code == 2 and "is no number of minutes" in capsys.readouterr().err
