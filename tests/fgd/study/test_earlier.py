import re
from pathlib import Path

import pytest
import torch

from fgd.config import load_config
from fgd.data.contents import describe_sets
from fgd.data.datasets import image_sets
from fgd.errors import UserError
from fgd.study.arms import study_config
from fgd.study.earlier import check_earlier, with_test_data
from fgd.study.files import disbelieved, is_finished, was_given_factor, write_measured
from fgd.study.plan import plan
from fgd.weights import weights_sha256
from tests.fgd.training import write_dataset

from .finished import finish

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
TEACHER = {"MODEL.DISTILLER.TEACHER.WEIGHTS": "t.pth"}


def test_finished_runs_of_another_config_are_refused(tmp_path):
    runs = plan(CONFIG, "", ["student"], [3], tmp_path, {})
    (run,) = runs
    check_earlier(runs)  # nothing is there
    finish(run)
    check_earlier(runs)  # nothing says how it was trained
    cfg = study_config(CONFIG, run.opts)
    cfg.SEED, cfg.OUTPUT_DIR = 3, "moved/since"
    (run.folder / "config.yaml").write_text(cfg.dump())
    check_earlier(runs)
    cfg.SOLVER.MAX_ITER = 7
    (run.folder / "config.yaml").write_text(cfg.dump())
    with pytest.raises(UserError, match="student, seed 3: .*SOLVER.MAX_ITER: 7 -> 600"):
        check_earlier(runs)


def test_a_measured_factor_is_no_difference_and_a_given_one_is(tmp_path):
    (run,) = plan(CONFIG, "", ["FGD"], [3], tmp_path, TEACHER)[1:]
    cfg = study_config(CONFIG, run.opts)
    finish(run)
    cfg.SEED, cfg.OUTPUT_DIR, cfg.MODEL.DISTILLER.FACTOR = 3, str(run.folder), 0.37
    (run.folder / "config.yaml").write_text(cfg.dump())
    check_earlier([run])
    for factor in (0.37, 0.5):
        (run,) = plan(CONFIG, "", ["FGD"], [3], tmp_path, TEACHER, {"FGD": factor})[1:]
        if factor == 0.37:
            check_earlier([run])
    with pytest.raises(UserError, match="FGD, seed 3: .*DISTILLER.FACTOR: 0.37 -> 0.5"):
        check_earlier([run])


def test_a_run_that_was_given_its_factor_does_not_pass_for_measured(tmp_path):
    """Nor one that has not finished: --resume would go on with the given one."""
    given, measured = (
        plan(CONFIG, "", ["FGD"], [3], tmp_path, TEACHER, factors)[1]
        for factors in ({"FGD": 0.5}, {})
    )
    write_measured(given)
    check_earlier([given])
    with pytest.raises(UserError, match="FGD, seed 3: begun in .* with a given .*FACTOR, and now"):
        check_earlier([measured])
    write_measured(measured)  # what it began with stays
    assert was_given_factor(given)
    (tmp_path / "FGD_3" / "measured.json").unlink()
    write_measured(measured)
    check_earlier([measured])
    (arm,) = plan(CONFIG, "", ["distil"], [3], tmp_path, TEACHER)[1:]
    write_measured(arm)
    assert not arm.folder.exists()  # it has the config's, whatever that is


HARMLESS = {
    "OUTPUT_DIR": "moved/since",
    "DOCTOR.IMAGES": 3,
    "DATALOADER.TIMEOUT": 7.0,
    "DATALOADER.BAD_IMAGES": "skip",
    "MODEL.DISTILLER.PICTURE_PERIOD": 9,
    "SOLVER.IGNORE_SAVE_ERRORS": True,
    "TEST.EVAL_PERIOD": 100,
    "DATASETS.SHAPES.ROOT": "elsewhere",
    "DATASETS.JSON.VALID": "moved.json",
    "SOLVER.KEEP_BEST": "bbox/AP",
}
OTHER = {
    "SOLVER.EMA_DECAY": 0.9,
    "TEST.DETECTIONS_PER_IMAGE": 7,
    "MODEL.WEIGHTS": "x.pth",
    "INPUT.MIN_SIZE_TEST": 64,
}


@pytest.mark.parametrize("key", [*HARMLESS, *OTHER])
def test_what_a_resumed_run_may_change_is_no_other_study(tmp_path, key):
    """Unless it bears on results, which a resumed run makes again and a finished one does not."""
    (run,) = plan(CONFIG, "", ["student"], [3], tmp_path, {})
    finish(run)
    cfg = study_config(CONFIG, run.opts)
    cfg.SEED = 3
    cfg.merge_from_list([key, {**HARMLESS, **OTHER}[key]])
    (run.folder / "config.yaml").write_text(cfg.dump())
    if key in HARMLESS:
        check_earlier([run])
        return
    with pytest.raises(UserError, match=f"student, seed 3: .*{key}: .* use another --output, or"):
        check_earlier([run])


@pytest.mark.parametrize(
    ("arm", "finished", "key", "refused"),
    [
        ("student", True, "MODEL.DISTILLER.FACTOR", False),
        ("student", False, "MODEL.DISTILLER.FGD.RELATION_WEIGHT", False),
        ("student-long", True, "MODEL.DISTILLER.INHERIT", False),
        ("FGD", True, "MODEL.DISTILLER.CROSSKD.REUSED_FROM", False),
        ("FGD", False, "MODEL.DISTILLER.FGD.RELATION_WEIGHT", True),
        ("FGD+PKD", True, "MODEL.DISTILLER.FGD.RELATION_WEIGHT", True),
        ("inherit", True, "MODEL.DISTILLER.INHERIT", True),
    ],
)
def test_a_key_that_cannot_affect_a_run_leaves_it_valid(tmp_path, arm, finished, key, refused):
    arms = ["student", "FGD", arm] if arm == "student-long" else [arm]
    run = next(x for x in plan(CONFIG, "", arms, [3], tmp_path, TEACHER) if x.arm == arm)
    cfg = study_config(CONFIG, run.opts)
    cfg.SEED = 3
    before = cfg.MODEL.DISTILLER
    for name in key.split(".")[2:-1]:
        before = before[name]
    name = key.rpartition(".")[2]
    before[name] = not before[name] if name == "INHERIT" else before[name] + 2
    write_checkpoint(run, cfg)
    if finished:
        finish(run)
    if not refused:
        return check_earlier([run])
    way = "finished" if finished else "begun"
    with pytest.raises(UserError, match=f"^{re.escape(str(run))}: {way} in .*{key}: .*; use anot"):
        check_earlier([run])


def test_a_run_that_cannot_go_on_is_refused_before_any_starts(tmp_path):
    """What --resume goes on with is no reason: other periods, another evaluation or folder."""
    (run,) = plan(CONFIG, "", ["student"], [3], tmp_path, {})
    cfg = study_config(CONFIG, run.opts)
    cfg.SEED, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD, cfg.OUTPUT_DIR = 3, 50, 7, "x"
    cfg.MODEL.WEIGHTS, cfg.INPUT.MIN_SIZE_TEST = "start.pth", 64
    write_checkpoint(run, cfg)
    check_earlier([run])
    cfg.SOLVER.BASE_LR = 0.5
    (run.folder / "config.yaml").write_text(cfg.dump())
    check_earlier([run])  # that attempt has left no checkpoint to go on from
    write_checkpoint(run, cfg)
    with pytest.raises(UserError) as error:
        check_earlier([run])
    assert str(error.value) == (
        f"student, seed 3: begun in {run.folder} with another config (SOLVER.BASE_LR: 0.5 -> "
        f"{study_config(CONFIG, {}).SOLVER.BASE_LR}); use another --output, or delete that folder"
    )


def write_checkpoint(run, cfg):
    run.folder.mkdir(exist_ok=True)
    torch.save({"full_config": cfg.dump()}, run.folder / "model_0000019.pth")
    (run.folder / "last_checkpoint").write_text("model_0000019.pth")


@pytest.fixture
def begun(tmp_path):
    """A run of `distil`, its config and its data; `write` says what its checkpoint says of it."""
    path = write_dataset(tmp_path / "data")
    (tmp_path / "t.pth").write_bytes(b"teacher")
    opts = {"DATASETS.JSON.TRAIN": str(path), "DATASETS.JSON.TEST": str(path)}
    opts |= {"DATASETS.TRAIN": "()", "DATASETS.TEST": "()"}
    opts["MODEL.DISTILLER.TEACHER.WEIGHTS"] = str(tmp_path / "t.pth")
    (run,) = plan(CONFIG, "", ["distil"], [3], tmp_path, opts)[1:]
    finish(run)
    cfg = load_config(CONFIG, [word for pair in run.opts.items() for word in pair])
    cfg.SEED = 3

    def write(**header):
        torch.save({"full_config": cfg.dump(), **header}, run.folder / "model_final.pth")
        (run.folder / "last_checkpoint").write_text("model_final.pth")

    write()
    return run, cfg, write


def test_results_have_to_be_of_the_test_data_and_the_checkpoint(begun):
    run, cfg, _ = begun
    assert not run.tested
    (run,) = with_test_data([run], cfg)
    now = describe_sets(image_sets(cfg, "TEST"))
    assert run.tested == now and is_finished(
        run
    )  # an earlier version does not say what they are of
    evaluated = {"weights": weights_sha256(str(run.folder / "model_final.pth")), **now}
    finish(run, evaluated=evaluated)
    assert is_finished(run)
    for key, text in (("images", "other test data (images differ)"), ("weights", "another check")):
        finish(run, evaluated={**evaluated, key: "0" * 64})
        assert not is_finished(run) and text in disbelieved(run)
        assert disbelieved(run).startswith(f"distil, seed 3: {run.folder}/results.json is of ")


def test_other_training_data_and_another_teacher_are_refused(begun, tmp_path):
    run, cfg, write = begun
    data = describe_sets(image_sets(cfg, "TRAIN"))
    teacher = {"weights": "t.pth", "sha256": weights_sha256(str(tmp_path / "t.pth"))}
    write(data=data, teacher=teacher)
    with_test_data([run], cfg)
    write(data={**data, "images": "0"}, teacher=teacher)
    with pytest.raises(UserError, match="distil, seed 3: begun in .* other training data .*images"):
        with_test_data([run], cfg)
    write(data=data, teacher={**teacher, "sha256": "0" * 64})
    with pytest.raises(
        UserError, match="taught in .* by another teacher .*SHA-256 00000000..., now"
    ):
        with_test_data([run], cfg)
    (tmp_path / "data" / "data.json").unlink()  # a report needs no data
    write(data=data, teacher=teacher)
    assert with_test_data([run], cfg)[0].tested == {}
