import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from fgd.errors import UserError
from fgd.study import step_times
from fgd.study.arms import study_config
from fgd.study.plan import plan
from fgd.study.runs import Runner, gpus
from fgd.study.step_times import StepTime

from .finished import finish

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
WRITE = """
import json, os, sys
os.chdir(sys.argv[1])
json.dump({"iteration": 1, "bbox": {"AP": 7.25}}, open("results.json", "w"))
open("gpu", "w").write(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
"""
FAIL = "print('no such cow'); raise SystemExit(3)"
# Saves when told to stop, as a training does; says first that it is ready.
SAVE = """
import signal, sys, time
def stop(*_):
    open(sys.argv[1] + "/saved", "w"); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + "/ready", "w"); time.sleep(60)
"""


class Scripted(Runner):
    """Runs small scripts in place of trainings: {str(run): script}, `WRITE` by default."""

    scripts = {}

    def command(self, run):
        super().command(run)  # its errors are the study's
        return [sys.executable, "-c", self.scripts.get(str(run), WRITE), str(run.folder)]


def make(tmp_path, arms, seeds=(0,), scripts=None, **options):
    runs = plan(CONFIG, "t.yaml", arms, seeds, tmp_path, {})
    runner = Scripted(runs, study_config(CONFIG, {}), tmp_path, **options)
    runner.scripts = scripts or {}
    return runner


def test_finished_runs_are_not_repeated_and_the_rest_is_run(tmp_path, capsys):
    runner = make(tmp_path, ["student", "distil"], scripts={"teacher": FAIL})
    finish(runner.runs[0], 70.0)  # so it is not run, and does not fail
    assert runner.run_all() == []
    out = capsys.readouterr().out
    assert "teacher: bbox AP 70.0 in" in out and "distil, seed 0: bbox AP 7.2 in" in out
    assert json.loads((tmp_path / "distil_0" / "minutes.json").read_text()) > 0
    assert runner.run_all() == []  # nothing is left


def test_one_failed_run_is_named_and_the_others_go_on(tmp_path, capsys):
    scripts = {"student, seed 0": FAIL}
    runner = make(tmp_path, ["student", "distil"], (0, 1), scripts, jobs=2)
    (failure,) = runner.run_all()
    assert failure.exit_code == 3 and not failure.stopped
    log = tmp_path / "student_0" / "console.txt"
    assert str(failure) == f"FAILED: student, seed 0: exit code 3: no such cow (log: {log})"
    assert str(failure) in capsys.readouterr().err and "no such cow" in log.read_text()
    done = [run for run in runner.runs if (run.folder / "results.json").exists()]
    assert len(done) == 4


def test_a_run_that_writes_no_results_has_failed(tmp_path):
    (failure,) = make(
        tmp_path, ["student"], scripts={"student, seed 0": "pass", "teacher": WRITE}
    ).run_all()
    assert failure.reason == "exit code 0: no output"


def test_without_teacher_only_the_student_runs(tmp_path):
    failures = make(tmp_path, ["student", "distil"], scripts={"teacher": FAIL}).run_all()
    assert [str(f.run) for f in failures] == ["teacher", "distil, seed 0"]
    assert "there is no teacher" in failures[1].reason
    assert (tmp_path / "student_0" / "results.json").exists()
    assert not (tmp_path / "distil_0").exists()


def test_runs_wait_for_those_that_they_need(tmp_path):
    """With room for all at once, and a teacher that takes its time."""
    late, taught = "import time; time.sleep(0.5)\n" + WRITE, "open('../teacher/results.json')\n"
    chdir = "import os, sys; os.chdir(sys.argv[1])\n"
    scripts = {"teacher": late, "distil, seed 0": chdir + taught + WRITE}
    runner = make(tmp_path, ["student", "distil"], scripts=scripts, jobs=3)
    assert runner.run_all() == []


def test_the_long_student_needs_times(tmp_path, monkeypatch):
    """An error in timing a step is one of this run."""

    def alone(*_):
        raise UserError(reason)

    reason = "t.pth does not exist"
    monkeypatch.setattr(step_times, "run_alone", alone)
    arms = ["student", "inherit+distil", "student-long"]
    (failure,) = make(tmp_path, arms, jobs=4).run_all()
    assert str(failure) == f"FAILED: student-long, seed 0: {reason}"  # no log: it was not started
    assert not failure.run.folder.exists()


def test_the_long_student_is_trained_for_the_measured_time(tmp_path, monkeypatch):
    runner = make(tmp_path, ["student", "inherit+distil", "student-long"], (4, 5), threads=3)
    timed = []

    def alone(_, student, arm, rounds, threads):
        timed.append((student, arm, threads))
        return StepTime(1.6, 0.5, 0.5)

    monkeypatch.setattr(step_times, "run_alone", alone)
    Runner.command(runner, runner.runs[-1])
    ((student, arm, threads),) = timed
    own = ["SEED", "4", "OUTPUT_DIR", str(tmp_path / "student_4")]
    assert student == [CONFIG, *own, "MODEL.META_ARCHITECTURE", "RetinaNet"] and threads == 3
    assert arm[:3] == [CONFIG, "SEED", "4"] and "MODEL.DISTILLER.TEACHER.WEIGHTS" in arm
    command = Runner.command(runner, runner.runs[-1])
    assert command[command.index("SOLVER.MAX_ITER") + 1] == "960"
    assert command[command.index("MODEL.META_ARCHITECTURE") + 1] == "RetinaNet"


def test_arms_of_methods_measure_their_factor(tmp_path):
    runner = make(tmp_path, ["FGD", "distil"])
    commands = {run.arm: Runner.command(runner, run) for run in runner.runs}
    assert [arm for arm, words in commands.items() if "--balance" in words] == ["FGD"]
    assert commands["FGD"].index("--balance") < commands["FGD"].index("--config-file")
    assert all("--resume" in words for words in commands.values())


def test_gpus_are_shared_out(tmp_path):
    runner = make(tmp_path, ["student"], (0, 1, 2), jobs=4, gpus=["5", "7"])
    assert runner.run_all() == []
    used = [(run.folder / "gpu").read_text() for run in runner.runs]
    assert sorted(used) == ["5", "5", "7", "7"]


def test_gpus_of_this_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert gpus("cuda", {}) == ["0", "1", "2"]
    assert gpus("cuda", {"CUDA_VISIBLE_DEVICES": "4,6"}) == ["4", "6"]
    assert gpus("cpu", {"CUDA_VISIBLE_DEVICES": "4,6"}) == gpus("cuda:1", {}) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_the_running_ones_save(tmp_path, number, capfd):
    runner = make(tmp_path, ["student"], scripts={"teacher": SAVE, "student, seed 0": SAVE}, jobs=2)
    folders = [run.folder for run in runner.runs]

    def stop_when_ready():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if all((folder / "ready").exists() for folder in folders):
                break
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    # A shell starts its background jobs with SIGINT ignored.
    of_shell = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run_all()
    finally:
        signal.signal(signal.SIGINT, of_shell)
    thread.join()
    assert all((folder / "saved").exists() for folder in folders)
    assert "stopped: student, seed 0 (log: " in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    runner.scripts = {}
    assert runner.run_all() == []  # the same again goes on


def test_a_run_that_was_stopped_has_not_failed(tmp_path):
    scripts = {"student, seed 0": "print('saved; --resume goes on'); raise SystemExit(75)"}
    (failure,) = make(tmp_path, ["student"], scripts=scripts).run_all()
    assert failure.stopped and str(failure).startswith(
        "stopped: student, seed 0: exit code 75: saved; --resume goes on (in a study: call the "
        "study again: it goes on with the run) (log: "
    )


def test_minutes_add_up_over_attempts(tmp_path):
    runner = make(tmp_path, ["student"], scripts={"student, seed 0": FAIL})
    finish(runner.runs[0])
    (tmp_path / "student_0").mkdir()
    (tmp_path / "student_0" / "minutes.json").write_text("100.0")
    runner.run_all()
    assert 100 < json.loads((tmp_path / "student_0" / "minutes.json").read_text()) < 101
