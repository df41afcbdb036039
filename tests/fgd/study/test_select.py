"""--select best: the validation set chooses, the test set reports."""

import json

import pytest
from PIL import Image, ImageOps

from fgd import cli
from fgd.errors import UserError
from fgd.study.__main__ import main
from fgd.study.arms import study_config
from fgd.study.earlier import check_earlier, with_test_data
from fgd.study.files import disbelieved, is_finished, read_result
from fgd.study.plan import plan
from fgd.study.runs import Runner
from fgd.study.select import keeping_best, select_facts, selected
from fgd.weights import weights_sha256
from tests.fgd.training import distilled, training_cfg, write_dataset

from .finished import finish

OPTS = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 9, "TEST.EVAL_PERIOD", 1)
OPTS += ("DOCTOR.BRIEF", False, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.01)


@pytest.fixture
def config_file(tmp_path):
    """A study's config with a validation set of other images."""
    cfg = distilled(training_cfg(tmp_path, opts=OPTS), tmp_path)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # DATASETS.JSON names them
    cfg.DATASETS.JSON.VALID = str(write_dataset(tmp_path / "valid"))
    for path in (tmp_path / "valid" / "images").iterdir():
        ImageOps.invert(Image.open(path)).save(path)
    (tmp_path / "fgd.yaml").write_text(cfg.dump())
    return str(tmp_path / "fgd.yaml")


def student_run(config_file, output, **opts):
    own = keeping_best(config_file, opts)
    (run,) = (x for x in selected(plan(config_file, "", ["student"], [0], output, own)) if x.select)
    return run


def test_only_students_that_are_compared_are_chosen(config_file, tmp_path):
    own = keeping_best(config_file, {})
    assert own == {"SOLVER.KEEP_BEST": "bbox/AP"}
    assert keeping_best(config_file, {"SOLVER.KEEP_BEST": "bbox/AP50"}) == {
        "SOLVER.KEEP_BEST": "bbox/AP50"
    }
    runs = selected(plan(config_file, "", ["student", "distil"], [0], tmp_path, own))
    assert [(run.arm, run.select) for run in runs] == [
        ("teacher", False),
        ("student", True),
        ("distil", True),
    ]
    chain = runs[2]._replace(before=(runs[2]._replace(arm="stage 1", select=False),))
    found = selected([chain.before[0], chain])
    assert [run.select for run in found] == [False, True]


def test_the_checkpoint_that_was_chosen_is_what_is_reported(
    config_file, tmp_path, capsys, monkeypatch
):
    """Both commands of a run, as the study gives them, and its page."""
    run = student_run(config_file, tmp_path / "study")
    runner = Runner([run], study_config(config_file, {}), tmp_path / "study")
    for expected in ("--resume", "--eval-only"):
        words = runner.command(run)[3:]
        assert words[0] == expected and not is_finished(run)
        assert cli.main(words) == 0
    result = read_result(run)
    best, final = (weights_sha256(str(run.folder / f"model_{x}.pth")) for x in ("best", "final"))
    assert result["evaluated"]["weights"] == best and is_finished(run)
    assert read_result(run.trained)["evaluated"]["weights"] == final != best
    words = ["--config-file", config_file, "--arms", "student", "--seeds", "0", "--report"]
    assert main([*words, "--select", "best", "--output", str(tmp_path / "study")]) == 0
    page = (tmp_path / "study" / "study.md").read_text()
    assert "the best bbox/AP on the validation set" in page and "chosen at" in page
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    (row,) = (row for row in study["arms"] if row["arm"] == "student")
    assert row["iterations"] == 4 and row["chosen"] == [result["iteration"]]
    run = with_test_data([run], study_config(config_file, run.opts))[0]
    assert is_finished(run)
    check_earlier([run])
    changed = run._replace(opts={**run.opts, "TEST.EVAL_PERIOD": "2"})
    with pytest.raises(UserError, match="another config .TEST.EVAL_PERIOD: 1 -> 2"):
        check_earlier([changed])
    check_earlier([changed.trained])  # whose results are of the last checkpoint
    Image.new("RGB", (96, 64)).save(tmp_path / "valid" / "images" / "0.png")
    with pytest.raises(UserError, match="begun in .* with other validation data than are there"):
        with_test_data([run], study_config(config_file, run.opts))


class Scripted(Runner):
    """A training that leaves a best checkpoint, then an evaluation of it."""

    training = "touch model_best.pth"

    def command(self, run):
        evaluates = "--eval-only" in super().command(run)
        script = f"cd {run.folder} && " + ("mkdir best && cd best" if evaluates else self.training)
        result = json.dumps({"iteration": 3 if evaluates else 9, "bbox": {"AP": 7.0}})
        return ["sh", "-c", f"{script} && echo '{result}' > results.json"]


def test_a_run_is_trained_then_evaluated_and_others_wait_for_both(config_file, tmp_path, capsys):
    run = student_run(config_file, tmp_path / "study")
    later = run._replace(arm="distil", folder=tmp_path / "later", needs=("student",))
    runner = Scripted([run, later], study_config(config_file, {}), tmp_path, jobs=2)
    assert runner.run_all() == []
    assert [read_result(x)["iteration"] for x in (run, run.trained)] == [3, 9]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["student, seed 0", "distil, seed 0"]
    assert lines[0].endswith("student_0/best")


def test_a_training_that_has_chosen_nothing_has_failed(config_file, tmp_path):
    run = student_run(config_file, tmp_path / "study")
    runner = Scripted([run], study_config(config_file, {}), tmp_path)
    runner.training = "true"
    (failure,) = runner.run_all()
    assert failure.exit_code == 2
    assert failure.reason == f"there is no {run.weights}: no evaluation gave a figure"


def test_results_of_the_last_checkpoint_do_not_pass_for_those_of_the_best(config_file, tmp_path):
    run = student_run(config_file, tmp_path / "study")
    finish(run.trained)
    assert is_finished(run.trained) and not is_finished(run) and disbelieved(run) == ""


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ({"DATASETS.JSON.VALID": ""}, "there is no validation set to choose by, and the test set"),
        ({"TEST.EVAL_PERIOD": "0"}, "SOLVER.KEEP_BEST bbox/AP: TEST.EVAL_PERIOD is 0"),
        ({"DATASETS.JSON.VALID": "data/data.json"}, "all 6 validation images are in the test set"),
    ],
)
def test_what_cannot_choose_is_refused(config_file, tmp_path, monkeypatch, capsys, opts, message):
    monkeypatch.chdir(tmp_path)
    words = ["--config-file", config_file, "--arms", "student", "--select", "best"]
    words += ["--output", str(tmp_path / "study")]
    assert main([*words, *(word for pair in opts.items() for word in pair)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_longer_arms_have_more_to_choose_from(config_file, tmp_path):
    cfg = study_config(config_file, {})
    run = student_run(config_file, tmp_path)
    assert select_facts([run.trained], cfg) == []
    (line,) = select_facts([run], cfg)
    assert line == (
        f"Each student is the checkpoint of its run with the best bbox/AP on the validation set "
        f"{tmp_path}/valid/data.json, evaluated every 1 iterations; the test set had no part in "
        "the choice. Chosen at: after so many iterations. A teacher is the checkpoint that teaches."
    )
    lines = select_facts([run, run._replace(arm="student-long")], cfg)
    assert lines[1] == "Longer runs (student-long) have more checkpoints to choose from."
