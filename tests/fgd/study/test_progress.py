import io
import json
import os

import pytest

from fgd.study.progress import Progress, State, describe, follow
from fgd.study.run import Run


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def run(tmp_path):
    run = Run("FGD", 0, "x.yaml", tmp_path / "FGD_0", {})
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 600}\n")
    return run


def write(run, *lines, written=1000.0, cut=""):
    path = run.folder / "metrics.json"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + cut)
    os.utime(path, (written, written))
    return path


STEP = {"iteration": 239, "eta_seconds": 200.0, "total_loss": 1.0}
SCORED = {"iteration": 240, "bbox/AP": 21.25}


def test_it_reads_what_is_new_and_begins_anew_where_a_resumed_run_cut_lines_off(run):
    path = write(run, STEP, SCORED, cut='{"iteration": 25')
    state = follow(path, State())
    assert state[1:] == (240, 200.0, 21.25)
    write(run, STEP, SCORED, {"iteration": 259, "eta_seconds": 180.5})
    assert follow(path, state)[1:] == (259, 180.5, 21.25)
    write(run, {"iteration": 19, "eta_seconds": 500})
    assert follow(path, state)[1:] == (19, 500, None)
    write(run, cut='{"a": NaN}\n[3]\n{"iteration": "x"}\n{{\n')
    assert follow(path, State())[1:] == (None, None, None)


def test_what_a_line_says(run):
    def said(*state, iterations=600, age=0.0):
        return describe(run, State(0, *state), iterations, age)

    assert said(None) == "FGD, seed 0: starting"
    assert said(239, 200.0, 21.25) == "FGD, seed 0: 240 of 600, 3 min left, AP 21.2"
    assert said(239, 200.0, age=150) == "FGD, seed 0: 240 of 600, 50 s left"
    assert said(239, 7500.0, 0.0) == "FGD, seed 0: 240 of 600, 2 h 5 min left, AP 0.0"
    assert said(599, 0.0, float("nan")) == "FGD, seed 0: 600 of 600, evaluating, AP none"
    assert said(19, iterations=None) == "FGD, seed 0: 20 iterations"
    given = run._replace(arm="teacher", eval_only=True)
    assert describe(given, State(), None, 0.0) == "teacher: evaluating"
    (run.folder / "results.json").touch()
    assert describe(run._replace(select=True), State(), None, 0.0) == "FGD, seed 0: evaluating"


def test_a_log_has_one_line_a_minute_for_all_runs(run):
    now, log = [1000.0], io.StringIO()
    progress = Progress(log, lambda: now[0])
    other = run._replace(arm="PKD", folder=run.folder / "none")
    write(run, STEP, SCORED)
    for _ in range(1500):  # two and a half minutes
        now[0] += 0.1
        progress.show([(run, now[0] - 900), (other, 1.0)])
        progress.clear()
    line = "FGD, seed 0: 240 of 600, {} left, AP 21.2; PKD, seed 0: starting\n"
    both = line.replace("240", "241")
    assert log.getvalue() == both.format("2 min") + both.format("80 s")
    progress.show([])
    write(run, STEP, written=800.0)  # before this attempt
    progress.looked = 0
    progress.show([(run, now[0] - 900)])
    assert log.getvalue().endswith("\nFGD, seed 0: starting\n")


def test_a_terminal_is_drawn_in_place_and_cleared_for_messages(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "21")
    now, screen = [1000.0], Terminal()
    progress = Progress(screen, lambda: now[0])
    write(run, STEP)
    other = run._replace(seed=1, folder=run.folder / "none")
    shown = "FGD, seed 0: 240 of \nFGD, seed 1: startin\n"
    for seconds in (1.5, 0.5, 1.5):  # the second is too early
        now[0] += seconds
        progress.show([(run, 100.0), (other, 100.0)])
    assert screen.getvalue() == f"{shown}\r\x1b[2A\x1b[J{shown}"
    progress.clear()
    progress.clear()  # nothing is there any more
    assert screen.getvalue() == f"{shown}\r\x1b[2A\x1b[J{shown}\r\x1b[2A\x1b[J"
