"""The command: whole files, one folder per teacher and settings, a kill that loses nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fgd.adversarial import folder as folders
from fgd.adversarial.__main__ import main
from fgd.adversarial.folder import RECORD, Folder
from fgd.adversarial.victim import Victim
from fgd.data.stream import build_train_stream
from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from fgd.methods.method import METHOD_REGISTRY, Method
from tests.fgd.training import distilled, training_cfg


@pytest.fixture
def config(tmp_path):
    """Path of a user's yaml; images go to ``tmp_path``/adversarial."""
    torch.manual_seed(3)
    cfg = distilled(training_cfg(tmp_path), tmp_path)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(tmp_path / "adversarial")
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return path


def call(config, *words):
    return main(["--config-file", str(config), *map(str, words)])


def pixels(folder):
    return {x.name: np.asarray(Image.open(x)).astype(int) for x in sorted(folder.glob("[!.]*.png"))}


def test_images_record_and_what_training_makes_of_them(config, tmp_path, capsys):
    assert call(config) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "adversarial"
    assert f"6 of 6 images to make in {folder}" in out
    assert f"6 of 6 training images have one: DATASETS.TRAIN_SECOND_IMAGES {folder}" in out
    found, clean = pixels(folder), pixels(tmp_path / "data" / "images")
    assert found.keys() == clean.keys() and len(found) == 6
    for name, image in found.items():
        assert image.shape == clean[name].shape and 4 <= np.abs(image - clean[name]).max() <= 8
    record = json.loads((folder / RECORD).read_text())
    assert record["images"] == sorted(found) and len(record["teacher"]["sha256"]) == 64
    assert record["settings"]["epsilon"] == 8 / 255 and record["settings"]["min_size"] == 64
    assert len(record["datasets"]) == 1 and record["datasets"][0].startswith("data_")
    assert sorted(os.listdir(folder)) == [*sorted(found), RECORD]
    cfg = training_cfg(tmp_path)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(folder)
    for sample in build_train_stream(cfg, second_images=True).first_batches(2)[0]:
        difference = sample["image"].int() - sample["second_image"].int()
        assert 1 < difference.abs().max() <= 9  # resizing rounds both

    # Again: nothing to do, and nothing is done.
    before = {x.name: x.stat().st_mtime_ns for x in folder.glob("[!.]*.png")}
    assert call(config) == 0
    assert "0 of 6 images to make" in capsys.readouterr().out
    assert {x.name: x.stat().st_mtime_ns for x in folder.glob("[!.]*.png")} == before


def test_a_stopped_command_goes_on_and_parts_add_up(config, tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole"
    assert call(config, "--output", whole) == 0
    mislead, count = Victim.mislead, []

    def fail_at_third(self, *args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return mislead(self, *args)

    monkeypatch.setattr(Victim, "mislead", fail_at_third)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        call(config, "--output", stopped)
    record = json.loads((stopped / RECORD).read_text())
    assert record["images"] == ["0.png", "1.png"] == sorted(pixels(stopped))
    monkeypatch.undo()
    (stopped / ".tmp_fgd_1_2.png").write_bytes(b"torn")  # of a killed process
    capsys.readouterr()
    assert call(config, "--output", stopped) == 0
    assert "4 of 6 images to make" in capsys.readouterr().out
    parts = tmp_path / "parts"
    for number in (2, 1, 4, 3):
        assert call(config, "--output", parts, "--part", f"{number}/4") == 0
    wanted = pixels(whole)
    for folder in (stopped, parts):
        found = pixels(folder)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[k], v) for k, v in wanted.items())
        assert (folder / RECORD).read_text() == (whole / RECORD).read_text()
    assert not list(stopped.glob(".tmp*"))


def test_a_kill_leaves_whole_files(config, tmp_path):
    """SIGKILL once two images are there; the next call makes the others."""
    code = "from fgd.adversarial.__main__ import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "--config-file", str(config), "--steps", "15"]
    folder = tmp_path / "adversarial"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("[!.]*.png"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(pixels(folder)) < 6  # each is whole: reading raises if it is torn
    json.loads((folder / RECORD).read_text())
    assert call(config, "--steps", 15) == 0
    assert len(pixels(folder)) == 6


REFUSED = {
    "settings": (["--epsilon", "4"], r"other settings: epsilon: 0.03137\d* -> 0.01568\d*\. Choose"),
    "size": (["INPUT.MIN_SIZE_TEST", "48"], "min_size: 64 -> 48"),
}


def test_a_folder_of_other_images_is_refused(config, tmp_path, capsys):
    assert call(config, "--part", "1/6") == 0
    folder = tmp_path / "adversarial"
    for words, message in REFUSED.values():
        assert call(config, *words) == 2
        assert re.search(message, capsys.readouterr().err)
    content = torch.load(tmp_path / "teacher.pth", weights_only=True)
    next(iter(content["model"].values())).add_(1)
    other = tmp_path / "other.pth"
    torch.save(content, other)
    assert call(config, "MODEL.DISTILLER.TEACHER.WEIGHTS", other) == 2
    error = capsys.readouterr().err
    assert re.search(r"teacher: \S*teacher.pth \(SHA-256 \w{8}\.+\) -> \S*other.pth \(SHA", error)
    moved = tmp_path / "moved.pth"
    shutil.copy(tmp_path / "teacher.pth", moved)  # the same content counts as the same
    assert call(config, "--part", "2/6", "MODEL.DISTILLER.TEACHER.WEIGHTS", moved) == 0
    (folder / RECORD).write_text("{")
    assert call(config) == 2
    assert f"{RECORD} cannot be read" in capsys.readouterr().err
    (folder / RECORD).unlink()
    assert call(config) == 2
    assert f"holds files and no {RECORD}" in capsys.readouterr().err
    assert call(config, "--output", tmp_path / "data" / "images") == 2  # the training images
    assert f"holds files and no {RECORD}" in capsys.readouterr().err
    assert set(pixels(tmp_path / "data" / "images")) == {f"{i}.png" for i in range(6)}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--steps", "0"], "--steps 0 is not at least 1"),
        (["--diversity-prob", "2"], "--diversity-prob 2.0 is not a probability"),
        (["DATASETS.TRAIN_SECOND_IMAGES", ""], "name the folder with --output"),
        (["MODEL.DISTILLER.TEACHER.WEIGHTS", ""], "WEIGHTS is empty: name the teacher"),
        (["MODEL.FOO", "1"], "MODEL.FOO"),
        (["MODEL.DEVICE", "tpu9"], "'tpu9' is not a device"),
    ],
)
def test_mistakes_are_one_line(words, message, config, capsys):
    assert call(config, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_parts_that_are_none(config, capsys):
    for text in ("0/4", "5/4", "1", "a/b"):
        with pytest.raises(SystemExit):
            call(config, "--part", text)
        assert "is not I/N" in capsys.readouterr().err


def test_names_are_kept_below_the_image_folder_and_must_not_meet(config, tmp_path, capsys):
    data = tmp_path / "data"
    content = json.loads((data / "data.json").read_text())
    (data / "images" / "sub").mkdir()
    Image.open(data / "images" / "0.png").convert("L").save(data / "images" / "sub" / "x.y.jpg")
    content["images"][0]["file_name"] = "sub/x.y.jpg"
    (data / "data.json").write_text(json.dumps(content))
    assert call(config) == 0
    found = np.asarray(Image.open(tmp_path / "adversarial" / "sub" / "x.y.png"))
    grey = np.asarray(Image.open(data / "images" / "sub" / "x.y.jpg"))[:, :, None]
    assert found.shape == (64, 96, 3) and np.abs(found.astype(int) - grey).max() <= 8
    cfg = training_cfg(tmp_path)
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(tmp_path / "adversarial")
    assert len(build_train_stream(cfg, second_images=True).dicts) == 6
    (data / "images" / "1.png").rename(data / "images" / "2.jpg")
    content["images"][1]["file_name"] = "2.jpg"
    (data / "data.json").write_text(json.dumps(content))
    assert call(config, "--output", tmp_path / "third") == 2
    assert re.search(r"2.(jpg|png) would both be written as 2.png", capsys.readouterr().err)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path / "a"), {"teacher": {"weights": "", "sha256": ""}})
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    folder.save("x.png", image)

    def fail(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(folders.Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        folder.save("y.png", image)
    assert sorted(os.listdir(folder.path)) == [RECORD, "x.png"]
    assert folder.has("x.png") and not folder.has("y.png")


def test_training_under_another_teacher_is_refused(config, tmp_path):
    @METHOD_REGISTRY.register()
    class Second(Method):
        needs = frozenset({"teacher", "second_view"})

    try:
        assert call(config) == 0
        cfg = distilled(training_cfg(tmp_path), tmp_path)  # draws other weights
        cfg.DATASETS.TRAIN_SECOND_IMAGES = str(tmp_path / "adversarial")
        FGDTrainer.build_train_loader(cfg)  # FGD does not ask for them
        cfg.MODEL.DISTILLER.METHOD = "Second"
        with pytest.raises(UserError, match="was made for another teacher, .*or delete advers"):
            FGDTrainer.build_train_loader(cfg)
        record = tmp_path / "adversarial" / RECORD
        record.unlink()
        assert FGDTrainer.build_train_loader(cfg).first_batches(1)[0][0]["second_image"].any()
    finally:
        METHOD_REGISTRY._obj_map.pop("Second")
