from pathlib import Path

import pytest

from fgd.errors import UserError
from fgd.study.arms import study_config
from fgd.study.earlier import check_finished
from fgd.study.files import was_given_factor, write_measured
from fgd.study.plan import plan

from .finished import finish

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
TEACHER = {"MODEL.DISTILLER.TEACHER.WEIGHTS": "t.pth"}


def test_finished_runs_of_another_config_are_refused(tmp_path):
    runs = plan(CONFIG, "", ["student"], [3], tmp_path, {})
    (run,) = runs
    check_finished(runs)  # nothing is there
    finish(run)
    check_finished(runs)  # nothing says how it was trained
    cfg = study_config(CONFIG, run.opts)
    cfg.SEED, cfg.OUTPUT_DIR = 3, "moved/since"
    (run.folder / "config.yaml").write_text(cfg.dump())
    check_finished(runs)
    cfg.SOLVER.MAX_ITER = 7
    (run.folder / "config.yaml").write_text(cfg.dump())
    with pytest.raises(UserError, match="student, seed 3: .*SOLVER.MAX_ITER: 7 -> 600"):
        check_finished(runs)


def test_a_measured_factor_is_no_difference_and_a_given_one_is(tmp_path):
    (run,) = plan(CONFIG, "", ["FGD"], [3], tmp_path, TEACHER)[1:]
    cfg = study_config(CONFIG, run.opts)
    finish(run)
    cfg.SEED, cfg.OUTPUT_DIR, cfg.MODEL.DISTILLER.FACTOR = 3, str(run.folder), 0.37
    (run.folder / "config.yaml").write_text(cfg.dump())
    check_finished([run])
    for factor in (0.37, 0.5):
        (run,) = plan(CONFIG, "", ["FGD"], [3], tmp_path, TEACHER, {"FGD": factor})[1:]
        if factor == 0.37:
            check_finished([run])
    with pytest.raises(UserError, match="FGD, seed 3: .*DISTILLER.FACTOR: 0.37 -> 0.5"):
        check_finished([run])


def test_a_run_that_was_given_its_factor_does_not_pass_for_measured(tmp_path):
    """Nor one that has not finished: --resume would go on with the given one."""
    given, measured = (
        plan(CONFIG, "", ["FGD"], [3], tmp_path, TEACHER, factors)[1]
        for factors in ({"FGD": 0.5}, {})
    )
    write_measured(given)
    check_finished([given])
    with pytest.raises(UserError, match="FGD, seed 3: begun in .* with a given .*FACTOR, and now"):
        check_finished([measured])
    write_measured(measured)  # what it began with stays
    assert was_given_factor(given)
    (tmp_path / "FGD_3" / "measured.json").unlink()
    write_measured(measured)
    check_finished([measured])
    (arm,) = plan(CONFIG, "", ["distil"], [3], tmp_path, TEACHER)[1:]
    write_measured(arm)
    assert not arm.folder.exists()  # it has the config's, whatever that is
