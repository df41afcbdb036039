from pathlib import Path

import pytest

from fgd.errors import UserError
from fgd.study.arms import plan, study_config
from fgd.study.earlier import check_finished

from .finished import finish

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")


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
