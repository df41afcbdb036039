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
        write_fake_graph(model, divisor=256.0)
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


def contents(folder):
    """Every file of an output, the journal's order and the lock left out."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".fgd_lock", "detections.jsonl")
    }


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_repaired_image_gives_the_files_of_a_fresh_run(model, tmp_path, batch_size, capsys):
    """Two files of one stem: the picture of the second kept its name when the first was damaged."""
    for name, colour in {"a.bmp": 40, "a.jpg": 90, "a.png": 200}.items():
        Image.new("RGB", (96, 64), (colour, 20, 255)).save(tmp_path / name)
    files = [tmp_path / name for name in ("a.bmp", "a.jpg", "a.png")]
    sound, options = files[0].read_bytes(), ("--batch-size", batch_size, "--format", "coco")
    files[0].write_bytes(sound[:100])
    assert run(model, *files, "--output", tmp_path / "out", *options) == 2
    assert {p.name for p in (tmp_path / "out" / "pictures").iterdir()} == {"a_2.jpg", "a_3.jpg"}
    files[0].write_bytes(sound)
    assert run(model, *files, "--output", tmp_path / "out", *options, "--resume") == 0
    assert run(model, *files, "--output", tmp_path / "fresh", *options) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    files[1].write_bytes(b"cut")  # and the other way round
    assert run(model, *files, "--output", tmp_path / "out", *options, "--resume") == 2
    assert run(model, *files, "--output", tmp_path / "fresh 2", *options) == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh 2")
    assert "Traceback" not in capsys.readouterr().err


def test_content_decides_whether_a_file_is_another(model, many, tmp_path, runs):
    """Not its date nor its size: a copy keeps both, a checkout changes one without a reason."""
    many = [path.rename(path.with_suffix(".bmp")) for path in many if not path.stem == "6"]
    for i, path in enumerate(many):
        Image.new("RGB", (96, 64), (i, 20, 255)).save(path)
    command = (model, *many, "--output", tmp_path / "out")
    assert run(*command) == 0
    before, status = many[0].read_bytes(), os.stat(many[0])
    many[0].write_bytes(many[1].read_bytes())
    os.utime(many[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(many[2])
    del runs[:]
    assert run(*command, "--resume") == 0 and runs == [1]
    assert run(model, *many, "--output", tmp_path / "fresh") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    many[0].write_bytes(before)
    del runs[:]
    assert run(*command, "--resume") == 0 and runs == [1]
    (tmp_path / "out" / "pictures" / "3.jpg").write_bytes(b"edited")
    assert run(*command, "--resume") == 0 and runs == [1, 1]


def test_other_company_in_a_batch_is_noticed(model, many, tmp_path, runs):
    command = (model, "--output", tmp_path / "out", "--batch-size", 3, "--resume")
    assert run(*command, *many[:5]) == 0 and runs == [3, 2]
    del runs[:]
    assert run(*command, *many[:6]) == 0 and runs == [3]
    del runs[:]
    assert run(*command, many[6], *many[:6]) == 0 and runs == [3, 3, 1]


def test_two_runs_cannot_share_an_output(model, many, tmp_path, capsys):
    out, content = tmp_path / "out", many[1].read_bytes()
    many[1].unlink()
    os.mkfifo(many[1])
    process, journal = typed(model, *many, "--output", out), out / "detections.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < 2:
        assert process.poll() is None  # it finishes the first image, then waits for the second
        time.sleep(0.01)
    other = tmp_path / "other.onnx"
    write_fake_graph(other, divisor=256.0)
    before = contents(out)
    for extra in ([], ["--resume"]):
        assert run(other, *many, "--output", out, *extra) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--output {out} is in use by another run of predict.py (pid {process.pid}" in line
    assert contents(out) == before
    process.kill()
    process.communicate(timeout=60)
    many[1].unlink()
    many[1].write_bytes(content)
    assert run(model, *many, "--output", out, "--resume") == 0
    assert "was killed; its lock is gone" in capsys.readouterr().err


def test_every_line_names_the_graph_that_made_it(model, many, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, *many, "--output", out) == 0
    sha256 = read(out)["graph_sha256"]
    first, *lines = map(json.loads, (out / "detections.jsonl").read_text().splitlines())
    assert first["model"] == sha256 and [line["model"] for line in lines] == [sha256] * 7
    lines[2]["model"] = "0" * 64  # as two runs into one folder mixed them
    text = "".join(json.dumps(line) + "\n" for line in (first, *lines))
    (out / "detections.jsonl").write_text(text)
    assert run(model, *many, "--output", out, "--resume") == 2
    assert "line 4 is of another model than the first line" in capsys.readouterr().err


def test_names_that_are_not_utf8_and_long_ones_are_done(model, tmp_path, capsys):
    names = [b"caf\xe9.png", b"\xff\n.png", b"x" * 251 + b".png", "größe.png".encode()]
    folder, out = os.fsencode(tmp_path / "odd"), tmp_path / "out"
    os.mkdir(folder)
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            Image.new("RGB", (96, 64), (26, 153, 255)).save(file, "PNG")
    with open(os.path.join(folder, b"z\xe9.png"), "wb") as file:
        file.write(b"cut")
    command = (model, tmp_path / "odd", "--output", out, "--format", "coco")
    for extra in ([], ["--resume"]):
        assert run(*command, *extra) == 2
        found = [os.fsencode(entry["file"]) for entry in read(out)["images"]]
        assert found == sorted(os.path.join(folder, name) for name in names)
        for entry in read(out)["images"]:
            assert Image.open(os.path.join(os.fsencode(out), os.fsencode(entry["picture"])))
        ids = json.loads((out / "coco_images.json").read_text(encoding="utf-8"))
        assert [os.fsencode(image["file_name"]) for image in ids["images"]] == found
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"failed: {tmp_path}/odd/z\\xe9.png: cannot read image")


def test_an_output_that_is_not_utf8(model, photos, tmp_path):
    out = os.fsencode(tmp_path) + b"/\xe9"
    command = [sys.executable, predict.__file__, model, photos, "--output", out]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"0 failed: " + os.fsencode(tmp_path) + b"/\\xe9/detections.json\n" in done.stdout


def test_progress_only_where_someone_watches(model, many, tmp_path):
    master, terminal = os.openpty()
    command = [sys.executable, predict.__file__, model, *many, "--output", tmp_path / "out"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    seen = os.read(master, 10000).decode()
    os.close(master)
    bars = [f"\r[{'#' * (30 * i // 7):.<30}] {i}/7 images" for i in range(1, 8)]
    assert done.returncode == 0 and seen.rstrip() == "".join(bars)


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
