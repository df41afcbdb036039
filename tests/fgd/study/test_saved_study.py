"""A study that was made before results said what they are of: its report, also on a full disk.

tests/fgd/saved_study holds what commit c361294 left of two arms of two steps on the networks of
tests/fgd/saved_run; of the checkpoints all but the tensors, of metrics.json a few losses.
"""

import errno
import json
import shutil
from pathlib import Path

import pytest

from fgd.files import atomic_write
from fgd.study import files
from fgd.study.__main__ import main
from tests.fgd.training import write_dataset

TESTS = Path(__file__).parents[1]
OPTS = ("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "5")
OPTS += ("DOCTOR.BRIEF", "False", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.01")


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Reports the study in ``study`` beside its data; the exit code."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data")
    for name in ("teacher.pth", "teacher.yaml"):
        shutil.copy(TESTS / "saved_run" / name, tmp_path)
    shutil.copy(TESTS / "saved_run" / "config.yaml", tmp_path / "fgd.yaml")
    shutil.copytree(TESTS / "saved_study", tmp_path / "study")
    words = ["--config-file", "fgd.yaml", "--arms", "student,distil", "--seeds", "0"]
    words += ["--output", "study", "--resamples", "50", "--report"]
    return lambda *opts: main([*words, *OPTS, *opts])


def study():
    return json.loads(Path("study/study.json").read_text())


def test_its_results_are_believed_and_its_report_is_what_it_was(report):
    before = study()
    assert report() == 0
    after = study()
    assert after["arms"] == before["arms"]
    keys = ("arm", "against", "class", "seeds", "difference")
    found, saved = (
        [[row[k] for k in keys] for row in x["changes"]["bbox"]] for x in (after, before)
    )
    assert found[: len(saved)] == saved  # how they are tested has changed since
    assert [row["arm"] for row in after["arms"]] == ["teacher", "student", "distil"]
    assert after["missing"][0] == "teacher: bbox has no AP, because nothing was detected"
    assert "Distilled maps are not shown: study/distil_0/model_final.pth" in after["missing"][1]
    assert len(after["missing"]) == 2


def test_another_config_is_refused_by_what_its_checkpoint_says(report, capsys):
    Path("study/student_0/config.yaml").unlink()
    assert report("SOLVER.BASE_LR", "0.5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: student, seed 0: finished in study/student_0 with another config"
    )
    assert line.endswith(" -> 0.5); use another --output, or delete that folder")


DETECTIONS = "inference/coco_instances_results.json"
ELSEWHERE = '[{"image_id": 77, "category_id": 1, "score": 1}]'


@pytest.mark.parametrize(
    ("file", "content", "code", "message"),
    [
        ("results.json", "{", 2, "is not JSON"),
        (DETECTIONS, "[3]", 0, "has something else than detections"),
        (DETECTIONS, ELSEWHERE, 0, "has images that are not in the test set"),
        ("minutes.json", "[" * 100_000, 2, "is nested too deeply"),
    ],
)
def test_damaged_files_are_named(report, capsys, monkeypatch, file, content, code, message):
    monkeypatch.setattr("fgd.study.__main__.draw", lambda *_: ({}, []))
    Path("study/student_0", file).write_text(content)
    assert report() == code
    told = capsys.readouterr().err if code else " ".join(study()["missing"])
    assert f"study/student_0/{file} {message}" in told


ORDER = ("study.json", "study.md", "study.html", "ap.png", "losses.png", "examples.png")


@pytest.mark.parametrize("full_at", ["study.html", "losses.png"])
def test_on_a_full_disk_text_comes_first_and_each_file_is_whole(
    report, capsys, monkeypatch, full_at
):
    Path("study/study.json").unlink()

    def until_full(path, write):
        def fill(file):
            write(file)
            if path.endswith(full_at):
                raise OSError(errno.ENOSPC, "No space left on device")

        atomic_write(path, fill)

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write", until_full)
        assert report() == 2
    out, err = capsys.readouterr()
    assert "| student | 0.0 " in out
    assert "Traceback" not in err
    (line,) = [told for told in err.splitlines() if told.startswith("error")]  # not of libraries
    assert line.startswith(f"error: cannot write study/{full_at} (No space left on device); make ")
    assert line.endswith("--report writes the pages alone")
    written = ORDER[: ORDER.index(full_at)]
    assert sorted(x.name for x in Path("study").iterdir() if x.is_file()) == sorted(written)
    assert report() == 0
    assert {x.name for x in Path("study").iterdir() if x.is_file()} == set(ORDER)
    page = Path("study/study.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and page.endswith("</html>\n")
