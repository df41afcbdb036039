"""Long runs: killed, interrupted, resumed, watched; none of it changes what is found."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from deploy import predict
from deploy.runtime import OrtDetector

from .fake_graph import write_fake_graph


@pytest.fixture
def model(tmp_path):
    write_fake_graph(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"a.png": (96, 64), "b.jpg": (64, 96), "c.PNG": (200, 100)}.items():
        Image.new("RGB", size, (26, 153, 255)).save(folder / name)
    return folder


def run(*args):
    return predict.main([str(arg) for arg in args])


def read(output):
    return json.loads((output / "detections.json").read_text(encoding="utf-8"))


def typed(*args, **options):
    command = [sys.executable, predict.__file__, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.fixture
def many(tmp_path):
    """Seven images, of two sizes and many colours; the canvas of a batch depends on both."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(7):
        size, colour = ((96, 64), (64, 96))[i % 2], (37 * i, 20, 255 - 30 * i)
        Image.new("RGB", size, colour).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_killed_and_resumed_equals_uninterrupted(model, many, tmp_path):
    """SIGKILL in the middle: the fifth image is a pipe, at which the run waits for ever."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert run(model, *many, "--output", whole, "--batch-size", 2) == 0
    content = many[4].read_bytes()
    many[4].unlink()
    os.mkfifo(many[4])
    process = typed(model, *many, "--output", halved, "--batch-size", 2)
    journal = halved / "detections.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -9 and not (halved / "detections.json").exists()
    many[4].unlink()
    many[4].write_bytes(content)
    kept = {path: path.stat().st_mtime_ns for path in (halved / "pictures").iterdir()}
    assert len(kept) == 4
    assert run(model, *many, "--output", halved, "--batch-size", 2, "--resume") == 0
    assert (halved / "detections.json").read_bytes() == (whole / "detections.json").read_bytes()
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert len(list((halved / "pictures").iterdir())) == 7


@pytest.fixture
def runs(monkeypatch):
    """Number of images in each run of the graph."""
    sizes, real = [], OrtDetector.run
    monkeypatch.setattr(
        OrtDetector, "run", lambda self, *args: sizes.append(len(args[0])) or real(self, *args)
    )
    return sizes


def test_resume_runs_only_what_is_missing_failed_or_changed(model, many, tmp_path, runs):
    out = tmp_path / "out"
    many[2].write_bytes(b"cut")
    command = (model, "--output", out, *many)
    assert run(*command) == 2 and len(runs) == 6
    before = read(out)
    del runs[:]
    assert run(*command, "--resume") == 2 and runs == [] and read(out) == before
    Image.new("RGB", (96, 64), (0, 0, 255)).save(many[2])  # was damaged
    Image.new("RGB", (50, 40), (0, 0, 255)).save(many[0])  # changed
    (out / "pictures" / "5.jpg").unlink()
    Image.new("RGB", (96, 64)).save(tmp_path / "new.png")
    assert run(*command, tmp_path / "new.png", "--resume") == 0 and len(runs) == 4
    after = read(out)
    assert [Path(e["file"]).name for e in after["images"]][6:] == ["6.png", "new.png"]
    assert after["failed"] == [] and after["images"][0]["width"] == 50
    assert [e for e in after["images"] if e in before["images"]] == [
        after["images"][i] for i in (1, 3, 4, 5, 6)
    ]
    del runs[:]
    assert run(*command) == 0 and len(runs) == 7  # without --resume, from the start


def test_a_line_cut_by_the_kill_is_done_again(model, many, tmp_path, runs):
    out = tmp_path / "out"
    command = (model, *many, "--output", out)
    assert run(*command) == 0
    before, journal = read(out), out / "detections.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    del runs[:]
    assert run(*command, "--resume") == 0
    assert len(runs) == 1 and read(out) == before
    assert [json.loads(line) for line in journal.read_text().splitlines()][-1]["entry"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--score", "0.3"], "score 0.5, now 0.3"),
        (["--batch-size", "2"], "batch_size 1, now 2"),
        (["--no-images"], "pictures True, now False"),
    ],
)
def test_resume_with_other_options_is_refused(model, many, tmp_path, options, message, capsys):
    command = (model, *many, "--output", tmp_path / "out", "--resume")
    assert run(*command) == 0  # nothing to resume: it simply begins
    before = (tmp_path / "out" / "detections.jsonl").read_bytes()
    assert run(*command, *options) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "detections.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["other model", "html", "middle line", "no entry"])
def test_resume_from_a_foreign_journal_is_refused(model, many, tmp_path, damage, capsys):
    command = (model, *many, "--output", tmp_path / "out")
    assert run(*command) == 0
    journal = tmp_path / "out" / "detections.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    if damage == "other model":
        write_fake_graph(model, divisor=254.0)
    elif damage == "html":
        journal.write_text("<html>\n")
    else:
        lines[3] = "{]\n" if damage == "middle line" else '{"file": "a"}\n'
        journal.write_text("".join(lines))
    assert run(*command, "--resume") == 2
    error = capsys.readouterr().err
    assert "leave out --resume to start over" in error and "Traceback" not in error
    assert run(*command) == 0


@pytest.mark.parametrize("lines", [0, 3])
def test_ctrl_c_is_one_line_and_can_be_resumed(model, many, tmp_path, lines):
    many[lines].unlink()
    os.mkfifo(many[lines])
    # A shell that starts the tests in the background makes them and their children ignore SIGINT.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = typed(model, *many, "--output", tmp_path / "out", preexec_fn=listen)
    journal = tmp_path / "out" / "detections.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") <= lines:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted\n")
    many[lines].unlink()
    Image.new("RGB", (96, 64)).save(many[lines])
    assert run(model, *many, "--output", tmp_path / "out", "--resume") == 0


def test_pixel_budget_is_an_option(model, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    out = tmp_path / "out"
    assert run(model, photos, "--output", out, "--max-pixels", 15000) == 2
    assert "c.PNG: 200x100 is more than 15000" in capsys.readouterr().err
    assert len(read(out)["images"]) == 2
    assert run(model, photos, "--output", out, "--max-pixels", 5000) == 2
    assert "c.PNG exceeds 5000 pixels" in capsys.readouterr().err
    assert run(model, photos, "--output", out, "--max-pixels", 20000) == 0


def test_progress_only_where_someone_watches(model, many, tmp_path):
    master, terminal = os.openpty()
    command = [sys.executable, predict.__file__, model, *many, "--output", tmp_path / "out"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    seen = os.read(master, 10000).decode()
    os.close(master)
    assert done.returncode == 0 and seen.startswith("\r1/7 images\r2/7 images")
    assert seen.endswith("\r7/7 images\r\n")


def test_a_full_disk_behind_stdout_is_no_success(model, photos, tmp_path):
    command = [sys.executable, predict.__file__, model, photos, "--output", tmp_path / "out"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_two_processes_at_once_agree(model, many, tmp_path):
    processes = [typed(model, *many, "--output", tmp_path / name) for name in "ab"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for process in processes:
        process.communicate(timeout=60)
    assert read(tmp_path / "a") == read(tmp_path / "b")
