"""The predict command, on a graph whose detections are known in advance."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from deploy import predict
from deploy.checks.verify_images import draw_scene
from deploy.runtime import OrtDetector

from .fake_graph import CLASSES, FRACTIONS, write_fake_graph


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def photos(tmp_path):
    """Three good images and a text file, which a folder listing passes over."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"a.png": (96, 64), "b.jpg": (64, 96), "c.PNG": (200, 100)}.items():
        Image.new("RGB", size, (26, 153, 255)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*args):
    return predict.main([str(arg) for arg in args])


def read(output):
    return json.loads((output / "detections.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_folder_gives_json_and_pictures(model, photos, tmp_path, batch_size, capsys):
    output = tmp_path / "new" / "out"
    assert run(model, photos, "--output", output, "--batch-size", batch_size) == 0
    report = read(output)
    assert [Path(entry["file"]).name for entry in report["images"]] == ["a.png", "b.jpg", "c.PNG"]
    first = report["images"][0]
    assert (first["height"], first["width"]) == (64, 96)
    # blue 255, green 153, red 26: rows 0 and 1 score 1.0 and 0.6, row 2 is under 0.5
    assert first["scores"] == [1.0, 0.6] and first["labels"] == [0, 1]
    assert first["class_names"] == ["circle", "square"]
    np.testing.assert_allclose(first["boxes"], np.array(FRACTIONS[:2]) * [96, 64, 96, 64])
    assert report["classes"] == list(CLASSES) and report["failed"] == []
    assert report["graph_sha256"] == OrtDetector(model).sha256
    pictures = sorted(path.name for path in (output / "pictures").iterdir())
    assert pictures == ["a.jpg", "b.jpg", "c.jpg"]
    assert [entry["picture"] for entry in report["images"]] == [f"pictures/{p}" for p in pictures]
    assert Image.open(output / "pictures" / "a.jpg").size == (480, 320)
    assert "3 images, 6 detections" in capsys.readouterr().out


def test_masks_are_written_as_rle_and_drawn(tiny, tmp_path):
    student = tiny("Mask R-CNN")
    Image.fromarray(draw_scene(np.random.default_rng(8), (480, 640))).save(tmp_path / "a.png")
    assert run(student.path, tmp_path / "a.png", "--output", tmp_path, "--score", 0.6) == 0
    (entry,) = read(tmp_path)["images"]
    (found,) = OrtDetector(student.path, min_score=0.6).detect([tmp_path / "a.png"])
    assert len(entry["segmentations"]) == len(entry["boxes"]) == len(found.scores) > 0
    for rle, mask in zip(entry["segmentations"], found.bitmaps(), strict=True):
        np.testing.assert_array_equal(coco_mask.decode(rle), mask)
    drawn = np.asarray(Image.open(tmp_path / entry["picture"])).astype(int)
    change = np.abs(drawn - np.asarray(Image.open(tmp_path / "a.png"))).sum(axis=2)
    inside = np.logical_or.reduce(list(found.bitmaps()))
    assert inside.any() and np.median(change[inside]) > 40


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_images_are_named_and_the_rest_is_done(model, photos, tmp_path, batch_size, capsys):
    (photos / "a1.jpg").write_bytes(b"\xff\xd8 cut")
    Image.new("RGB", (4000, 1)).save(photos / "a2.png")  # readable, but too thin for the network
    status = run(
        model, photos, tmp_path / "gone.jpg", "--output", tmp_path, "--batch-size", batch_size
    )
    report = read(tmp_path)
    assert status == 2
    assert [Path(entry["file"]).name for entry in report["images"]] == ["a.png", "b.jpg", "c.PNG"]
    failed = [Path(entry["file"]).name for entry in report["failed"]]
    assert failed == ["a1.jpg", "a2.png", "gone.jpg"]
    errors = capsys.readouterr().err
    assert all(name in errors for name in failed) and "too thin" in errors
    assert "Traceback" not in errors and "\r" not in errors


def test_all_images_bad_still_gives_a_report(model, tmp_path):
    assert run(model, tmp_path / "x.jpg", "--output", tmp_path / "out") == 2
    assert read(tmp_path / "out")["images"] == []


def test_score_option_and_no_images(model, photos, tmp_path):
    out = tmp_path / "out"
    assert run(model, photos / "a.png", "--output", out, "--score", "0.05", "--no-images") == 0
    (entry,) = read(out)["images"]
    assert entry["scores"] == [1.0, 0.6, pytest.approx(26 / 255, abs=1e-5)]
    assert "picture" not in entry and not (out / "pictures").exists()


def test_pictures_never_collide_nor_replace_inputs(model, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (96, 64)).save(folder / name)
    before = (folder / "a.jpg").read_bytes()
    assert run(model, folder, "--output", tmp_path) == 0
    assert (folder / "a.jpg").read_bytes() == before
    assert [e["picture"] for e in read(tmp_path)["images"]] == [
        "pictures/a_2.jpg",
        "pictures/a_3.jpg",
    ]


def test_a_network_failure_names_every_image(tmp_path, photos):
    write_fake_graph(tmp_path / "nan.onnx", divisor=0.0)
    assert run(tmp_path / "nan.onnx", photos, "--output", tmp_path, "--batch-size", 3) == 2
    report = read(tmp_path)
    assert len(report["failed"]) == 3 and "NaN" in report["failed"][0]["error"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "no.onnx"}, "no.onnx"),
        ({"images": "empty"}, "holds no image"),
        ({"--batch-size": "0"}, "--batch-size"),
        ({"--provider": "cuda"}, "CUDAExecutionProvider"),
        ({"--output": "model.onnx/out"}, "cannot make folder"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(model, photos, tmp_path, change, message, capsys):
    (tmp_path / "empty").mkdir()
    args = {"model": model, "images": photos, "--output": tmp_path / "out"}
    for key, value in change.items():
        args[key] = value if key in ("--batch-size", "--provider") else tmp_path / value
    flags = [item for pair in args.items() for item in pair if item not in ("model", "images")]
    assert run(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_output_is_replaced_whole_or_not_at_all(model, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(model, photos, "--output", out, "--no-images") == 0
    before = (out / "detections.json").read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    assert run(model, photos / "a.png", "--output", out, "--no-images") == 2
    assert (out / "detections.json").read_bytes() == before
    names = sorted(path.name for path in out.iterdir())
    assert names == [".fgd_lock", "detections.json", "detections.jsonl"]


def test_as_typed_from_another_folder(model, photos, tmp_path):
    script = Path(predict.__file__)
    command = [sys.executable, script, "model.onnx", "photos", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read(tmp_path / "out")["images"]) == 3


def test_closed_pipe_is_no_traceback_but_no_success(model, photos, tmp_path):
    """As in `predict.py ... | head -0`: what was printed is lost, what was written is there."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, predict.__file__, model, photos, "--output", tmp_path / "out"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    assert len(read(tmp_path / "out")["images"]) == 3
