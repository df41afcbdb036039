import json
from pathlib import Path

import pytest

from fgd.errors import UserError
from fgd.study.arms import study_config
from fgd.study.comparisons import pairs
from fgd.study.earlier import check_earlier
from fgd.study.facts import stage_facts
from fgd.study.plan import plan, study_stages
from fgd.study.report import stage_table
from fgd.study.runs import Runner
from fgd.study.stages import not_inheriting, stage_rows, wrong_starts
from fgd.study.summary import summarize

from .finished import finish
from .test_runs import FAIL, WRITE, Scripted

QUICK = Path(__file__).parents[3] / "configs" / "quick"
CONFIG = str(QUICK / "shapes_fgd_retinanet.yaml")
WEIGHTS = "MODEL.DISTILLER.TEACHER.WEIGHTS"


@pytest.fixture
def files(tmp_path):
    """Two stages over the quick config, the first with a teacher of its own, of 600 and 200."""
    return [
        write(tmp_path / "a.yaml", 'DISTILLER: {INHERIT: True, TEACHER: {WEIGHTS: "weak.pth"}}'),
        write(tmp_path / "b.yaml", "DISTILLER: {INHERIT: True}", "SOLVER: {MAX_ITER: 200}"),
    ]


def write(path, model="", more=""):
    path.write_text(f'_BASE_: "{CONFIG}"\nMODEL: {{{model}}}\n{more}\n')
    return str(path)


def stages_of(files, output=Path("out"), teacher="t.yaml", opts=None):
    return study_stages(files, CONFIG, teacher, output, opts or {})


def runs_of(files, arms, output, seeds=(0, 1), opts=None):
    stages = stages_of(files, output, opts=opts)
    return plan(CONFIG, "t.yaml", arms, seeds, output, opts or {}, stages=stages)


def test_a_stage_starts_from_the_student_of_the_one_before(files):
    opts = {"INPUT.FORMAT": "RGB"}
    runs = runs_of(files, ["student", "stages"], Path("out"), opts=opts)
    names = ["teacher", "student, seed 0", "student, seed 1", "stage 1, seed 0", "stages, seed 0"]
    assert [str(run) for run in runs] == [*names, "stage 1, seed 1", "stages, seed 1"]
    first, last = runs[3:5]
    assert first.opts == opts and first.needs == () and first.before == ()
    assert first.folder == Path("out/stages_0/stage1") and first.config_file == files[0]
    assert last.opts == {
        **opts,
        WEIGHTS: "out/teacher/model_final.pth",  # its config names none: the study's
        "MODEL.DISTILLER.TEACHER.CONFIG_FILE": "",
        "MODEL.WEIGHTS": "out/stages_0/stage1/model_final.pth",
        "MODEL.DISTILLER.INHERIT": "False",
    }
    assert last.needs == ("stage 1, seed 0", "teacher") and last.before == (first,)
    assert last.folder == Path("out/stages_0/stage2") and not last.balance
    cfg = study_config(last.config_file, last.opts)
    assert not cfg.MODEL.DISTILLER.INHERIT and cfg.SOLVER.MAX_ITER == 200
    assert study_config(first.config_file, first.opts).MODEL.DISTILLER.INHERIT


def test_three_stages_are_a_chain(files):
    runs = runs_of([*files, files[0]], ["stages"], Path("out"), seeds=(5,))[1:]
    assert [run.arm for run in runs] == ["stage 1", "stage 2", "stages"]
    assert runs[2].before == (runs[0], runs[1]) and runs[2].needs == ("stage 2, seed 5",)
    assert runs[2].opts[WEIGHTS[:15] + ".INHERIT"] == "False"


def test_the_teacher_of_the_options_is_the_studys_and_not_a_stages(files):
    opts = {WEIGHTS: "strong.pth", "MODEL.DISTILLER.TEACHER.CHANNELS_LAST": "True"}
    stages = stages_of(files, teacher="", opts=opts)
    found = [stage.cfg.MODEL.DISTILLER.TEACHER for stage in stages]
    assert [node.WEIGHTS for node in found] == ["weak.pth", "strong.pth"]
    assert all(node.CHANNELS_LAST for node in found) and stages[1].needs == ()


def test_one_teacher_gets_the_iterations_of_all(files):
    files[1] = write(
        Path(files[1]),
        "DISTILLER: {INHERIT: True, SCHEDULE: {START: 10, WARMUP_ITERS: 5}}",
        "SOLVER: {MAX_ITER: 200, WARMUP_ITERS: 20, STEPS: [100, 150]}",
    )
    run = runs_of(files, ["single-long"], Path("out"))[1]
    cfg = study_config(run.config_file, run.opts)
    assert run.folder == Path("out/single-long_0") and run.needs == ("teacher",)
    assert cfg.SOLVER.MAX_ITER == 800 and cfg.SOLVER.WARMUP_ITERS == 80
    assert tuple(cfg.SOLVER.STEPS) == (400, 600)
    schedule = cfg.MODEL.DISTILLER.SCHEDULE
    assert (schedule.START, schedule.STOP, schedule.WARMUP_ITERS) == (40, 0, 20)
    assert cfg.MODEL.DISTILLER.INHERIT and cfg.MODEL.WEIGHTS == ""  # as its config says


def test_what_a_later_stage_would_inherit_is_said(files):
    stages = stages_of(files)
    (line,) = not_inheriting(stages)
    assert line.startswith("Stage 2: MODEL.DISTILLER.INHERIT True of ") and "stage 1" in line
    told = " ".join(stage_facts(["stages"], stages))
    assert "600 + 200 iterations" in told and line in told and "add the arm single-long" in told
    told = " ".join(stage_facts(["single-long"], stages))
    assert "alone for 800 iterations" in told and "600 + 200" not in told
    assert stage_facts(["student"], []) == []


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (("DISTILLER: {METHOD: '', INHERIT: True}", ""), "nothing is distilled"),
        (("FPN: {OUT_CHANNELS: 32}", ""), "not the study's .MODEL.FPN.OUT_CHANNELS: 64 -> 32"),
        (("", "DATASETS: {SHAPES: {NOISE: 1.0}}"), "NOISE: 8.0 -> 1.0"),
        (("META_ARCHITECTURE: RetinaNet", ""), "META_ARCHITECTURE is not Distiller"),
        (("DISTILLER: {MAGIC: 1}", ""), "MAGIC"),
    ],
)
def test_a_stage_that_cannot_follow_is_refused(files, stage, message):
    files[1] = write(Path(files[1]), *stage)
    with pytest.raises(UserError, match=f"--stages, stage 2, .*b.yaml: .*{message}"):
        stages_of(files)


def test_other_refusals(files):
    with pytest.raises(UserError, match="alone is no chain"):
        stages_of(files[:1])
    with pytest.raises(UserError, match="b.yaml: .*WEIGHTS is empty, and the study has no teacher"):
        stages_of(files, teacher="")
    with pytest.raises(UserError, match="--arms: stages needs --stages"):
        plan(CONFIG, "t.yaml", ["stages"], [0], Path("out"), {})
    with pytest.raises(UserError, match="add stages or single-long to --arms"):
        plan(CONFIG, "t.yaml", ["student"], [0], Path("out"), {}, stages=stages_of(files))
    files[0] = write(Path(files[0]), 'WEIGHTS: "other.pth", DISTILLER: {TEACHER: {WEIGHTS: "w"}}')
    with pytest.raises(UserError, match="stage 1.*MODEL.WEIGHTS:  -> other.pth"):
        stages_of(files)
    files[0] = write(Path(files[0]), 'DISTILLER: {TEACHER: {WEIGHTS: "w"}}')
    files[1] = write(Path(files[1]), 'WEIGHTS: "other.pth"')
    assert len(stages_of(files)) == 2  # replaced by the student before


def test_a_killed_chain_goes_on_where_it_was(files, tmp_path):
    """Stage 2 of seed 0 dies; the same again trains it and nothing else."""
    runs = runs_of(files, ["stages"], tmp_path / "study")
    runner = Scripted(runs, study_config(CONFIG, {}), tmp_path / "study")
    runner.scripts = {"stages, seed 0": "import os; os.kill(os.getpid(), 9)"}
    (failure,) = runner.run_all()
    assert str(failure.run) == "stages, seed 0" and failure.exit_code == 137
    first = times(runs)
    assert len(first) == len(runs) - 1
    again = Scripted(runs, study_config(CONFIG, {}), tmp_path / "study")
    assert again.run_all() == []
    second = times(runs)
    assert second.keys() - first.keys() == {"stages, seed 0"} and first.items() <= second.items()


def times(runs):
    """When each finished run wrote its results."""
    found = {str(run): run.folder / "results.json" for run in runs}
    return {name: path.stat().st_mtime_ns for name, path in found.items() if path.exists()}


def test_a_stage_waits_for_its_own_seed_alone_and_does_not_start_without_it(files, tmp_path):
    runs = runs_of([*files, files[0]], ["stages"], tmp_path / "study")
    runner = Scripted(runs, study_config(CONFIG, {}), tmp_path / "study", jobs=3)
    # Of seed 0 the first stage fails; of seed 1 each reads the results of the one before.
    read = "import sys; open(sys.argv[1] + '/../stage%d/results.json')\n" + WRITE.replace("%", "%%")
    runner.scripts = {
        "stage 1, seed 0": FAIL,
        "stage 2, seed 1": read % 1,
        "stages, seed 1": read % 2,
    }
    failures = {str(failure.run): failure.reason for failure in runner.run_all()}
    assert failures == {
        "stage 1, seed 0": "exit code 3: no such cow",
        "stage 2, seed 0": "not started, stage 1, seed 0 has no results",
        "stages, seed 0": "not started, stage 2, seed 0 has no results",
    }
    assert (tmp_path / "study" / "stages_1" / "stage3" / "results.json").exists()


def test_the_command_says_what_a_stage_must_start_as(files, tmp_path):
    runs = runs_of(files, ["stages"], tmp_path)
    runner = Runner(runs, study_config(CONFIG, {}), tmp_path)
    first, last = (runner.command(run) for run in runs[1:3])
    assert "--starts-as" not in first and "--resume" in last
    expected = str(tmp_path / "stages_0" / "stage1" / "results.json")
    assert last[last.index("--starts-as") + 1] == expected
    assert last.index("--starts-as") < last.index("--config-file")


@pytest.fixture
def finished(files, tmp_path):
    """Runs of two seeds, all finished: stage 1 at 20 and 24, stages at 30 and 34."""
    output = tmp_path / "study"
    runs = runs_of(files, ["student", "stages", "single-long"], output)
    aps = {"teacher": 60, "student": 10, "single-long": 28, "stage 1": 20, "stages": 30}
    for run in runs:
        ap = aps[run.arm] + 4 * run.seed
        finish(run, ap, minutes=2.0, iterations=200 if run.arm == "stages" else 600)
        if run.arm == "stages":
            start = {"iteration": 0, "bbox": {"AP": 20.0 + 4 * run.seed}}
            (run.folder / "start.json").write_text(json.dumps(start))
    return runs, stages_of(files, output)


def test_the_arm_is_the_whole_chain(finished):
    runs, _ = finished
    rows = {row["arm"]: row for row in summarize(runs)}
    assert list(rows) == ["teacher", "student", "stages", "single-long"]  # stage 1 is no arm
    assert rows["stages"]["iterations"] == 800 and rows["stages"]["minutes"] == 4.0
    assert rows["stages"]["bbox"]["AP"]["each"] == [30, 34]
    assert rows["stages"]["bbox"]["gap closed"] == pytest.approx(100 * 20 / (60 - 12))
    assert pairs(list(rows), study_config(CONFIG, {})) == [
        ("stages", "student"),
        ("single-long", "student"),
        ("stages", "single-long"),
    ]


def test_the_page_shows_each_stage_from_start_to_end(finished, files):
    runs, stages = finished
    head, first, last = stage_table(stage_rows(runs, stages), "bbox")
    assert head[-2:] == ["AP at the start", "AP at the end"]
    assert first == ["1", files[0], "FGD", "weak.pth", "600", "–", "22.0 ± 2.8"]
    teacher = str(runs[0].folder / "model_final.pth")
    assert last == ["2", files[1], "FGD", teacher, "200", "22.0 ± 2.8", "32.0 ± 2.8"]
    for run in runs:
        (run.folder / "results.json").unlink()
    assert stage_table(stage_rows(runs, stages), "bbox")[1][-2:] == ["–", "–"]


def test_a_stage_that_does_not_go_on_from_the_one_before_is_named(finished):
    runs, _ = finished
    assert wrong_starts(runs) == []
    by_name = {str(run): run for run in runs}
    finish(by_name["stage 1, seed 1"], 23.9)  # trained again since
    (by_name["stages, seed 0"].folder / "start.json").unlink()
    first, second = wrong_starts(runs)
    assert first.startswith("stages, seed 0 did not go on from stage 1, seed 0")
    assert "start.json is missing" in first
    assert "starts with bbox AP 24.00" in second and "says 23.90" in second


def test_a_study_that_was_moved_goes_on(files, tmp_path):
    """Only MODEL.WEIGHTS of a later stage names a place in it."""
    run = runs_of(files, ["stages"], tmp_path / "old", seeds=(0,))[-1]
    finish(run)
    cfg = study_config(run.config_file, run.opts)
    cfg.SEED = 0
    (run.folder / "config.yaml").write_text(cfg.dump())
    (tmp_path / "old").rename(tmp_path / "new")
    moved = runs_of(files, ["stages"], tmp_path / "new", seeds=(0,))
    check_earlier(moved)
    with pytest.raises(UserError, match="stages, seed 0: .*IMS_PER_BATCH: 16 -> 8"):
        more = {"SOLVER.IMS_PER_BATCH": "8"}
        check_earlier(runs_of(files, ["stages"], tmp_path / "new", (0,), more)[-1:])
