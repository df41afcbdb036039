import errno
import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch

from fgd import job
from fgd.data.datasets import register_from_config
from fgd.engine import checkpoint
from fgd.engine.best import metric_names
from fgd.engine.solver import check_solver
from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from tests.fgd.training import assert_equal, training_cfg, write_dataset

from .test_trainer import load

KEYS = ("SOLVER.KEEP_BEST", "bbox/AP", "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1)
KEYS += ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ())


def run(cfg, monkeypatch, figures, resume=False, **options):
    """Train, with these figures as the results of evaluations; the sets that were evaluated."""
    left, sets = iter(figures), []

    def test(cls, cfg, model, evaluators=None):
        sets.append(*cfg.DATASETS.TEST)
        figure = next(left)
        if figure == "stop":
            raise KeyboardInterrupt
        return {"bbox": {"AP": figure, "AP50": -1.0}}

    monkeypatch.setattr(FGDTrainer, "test", classmethod(test))
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume, **options)
    try:
        trainer.train()
    except KeyboardInterrupt:
        sets.append("stopped")
    return sets


def best_of(cfg):
    return load(Path(cfg.OUTPUT_DIR) / "model_best.pth")


@pytest.mark.parametrize(
    ("figures", "figure", "iteration"),
    [
        ((1.0, 3.0, 2.0, 3.0), 3.0, 1),  # the earlier of two that are equal
        ((1.0, 2.0, 3.0, 4.0), 4.0, 3),  # the last one counts
        ((math.nan, 0.5, math.nan, 0.25), 0.5, 1),  # nothing was detected
    ],
)
def test_the_best_evaluation_is_kept_through_rotation(
    tmp_path, monkeypatch, figures, figure, iteration
):
    cfg = training_cfg(tmp_path, opts=(*KEYS, "SOLVER.KEEP_CHECKPOINTS", 1))
    run(cfg, monkeypatch, figures)
    names = sorted(x for x in os.listdir(cfg.OUTPUT_DIR) if x.endswith(".pth"))
    assert names == ["model_0000003.pth", "model_best.pth", "model_final.pth"]
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"
    best = best_of(cfg)
    assert best["iteration"] == iteration and best["trainer"]["iteration"] == iteration
    digests = {"annotations": best["best"]["annotations"], "images": best["best"]["images"]}
    record = {"metric": "bbox/AP", "figure": figure, "iteration": iteration}
    assert best["best"] == {**record, **digests} and len(digests["images"]) == 64


def test_its_weights_are_those_that_were_evaluated(tmp_path, monkeypatch):
    cfg = training_cfg(tmp_path, opts=(*KEYS, "SOLVER.EMA_DECAY", 0.5))
    run(cfg, monkeypatch, (1.0, 3.0, 2.0, 2.5))
    other = load(Path(cfg.OUTPUT_DIR) / "model_0000001.pth")
    for key in ("model", "raw", "rng"):
        assert_equal(best_of(cfg)[key], other[key])


def test_a_resumed_run_remembers_the_best(tmp_path, monkeypatch, caplog):
    """Also where a stop has taken back the iteration that it is of."""
    cfg = training_cfg(tmp_path, opts=KEYS)
    assert run(cfg, monkeypatch, (1.0, 3.0, "stop"))[-1] == "stopped"
    run(cfg, monkeypatch, (2.0, 2.5), resume=True)
    assert best_of(cfg)["best"]["figure"] == 3.0
    os.remove(tmp_path / "out" / "model_final.pth")
    cfg.SOLVER.MAX_ITER = 5
    run(cfg, monkeypatch, (3.5,), resume=True)
    assert best_of(cfg)["best"]["figure"] == 3.5 and best_of(cfg)["iteration"] == 4


def test_the_best_of_another_evaluation_or_training_is_no_best(tmp_path, monkeypatch, caplog):
    cfg = training_cfg(tmp_path, opts=KEYS)
    run(cfg, monkeypatch, (1.0, 3.0, 2.0, 9.0))
    for name in ("model_final.pth", "model_0000003.pth"):
        os.remove(tmp_path / "out" / name)
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000002.pth")
    cfg.SOLVER.BASE_LR = 0.02
    run(cfg, monkeypatch, (0.5,), resume=True, allow_changes=True)
    assert best_of(cfg)["best"]["figure"] == 0.5
    assert "another evaluation or training (training differ); the next evaluation" in caplog.text
    cfg.SOLVER.KEEP_BEST, cfg.SOLVER.MAX_ITER = "bbox/AP50", 5
    run(cfg, monkeypatch, (7.0,), resume=True)
    assert best_of(cfg)["best"]["metric"] == "bbox/AP50"
    assert "(metric differ)" in caplog.text
    (tmp_path / "out" / "model_best.pth").write_bytes(b"PK")
    cfg.SOLVER.MAX_ITER = 6
    run(cfg, monkeypatch, (7.0,), resume=True)
    assert "the best so far is not known" in caplog.text
    assert best_of(cfg)["iteration"] == 5


@pytest.mark.parametrize("ignore", [False, True])
def test_a_best_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path, monkeypatch, caplog, ignore
):
    cfg = training_cfg(tmp_path, opts=(*KEYS, "SOLVER.IGNORE_SAVE_ERRORS", ignore))
    write, tries = checkpoint.atomic_write, []

    def full(path, content):
        tries.append(path.endswith("model_best.pth"))
        if sum(tries) == 2 and tries[-1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "atomic_write", full)
    if ignore:
        run(cfg, monkeypatch, (1.0, 3.0, 2.0, 0.5))
        assert best_of(cfg)["best"]["figure"] == 2.0 and "training goes on, UNSAVED" in caplog.text
    else:
        with pytest.raises(UserError, match="cannot write .*model_best.pth: .*No space left"):
            run(cfg, monkeypatch, (1.0, 3.0))
        assert best_of(cfg)["best"]["figure"] == 1.0


def test_a_validation_set_chooses_and_the_test_set_reports(tmp_path, monkeypatch, caplog):
    cfg = training_cfg(tmp_path, opts=KEYS)
    cfg.DATASETS.JSON.VALID = str(write_dataset(tmp_path / "valid"))
    cfg = register_from_config(cfg)
    (valid,), (test,) = cfg.DATASETS.VALID, cfg.DATASETS.TEST
    caplog.set_level(logging.WARNING, "fgd")
    sets = run(cfg, monkeypatch, (1.0, 4.0, 2.0, 3.0, 9.0))
    assert sets == [valid] * 4 + [test] and valid != test
    assert best_of(cfg)["best"]["figure"] == 4.0
    last = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert (last["valid/bbox/AP"], last["bbox/AP"]) == (3.0, 9.0)
    assert "KEEP_BEST" not in caplog.text
    job.say_if_shared(cfg)
    assert "all 6 validation images are in the training set too" in caplog.text
    assert "all 6 validation images are in the test set too" in caplog.text


def test_to_choose_by_the_test_set_is_said(tmp_path, caplog):
    FGDTrainer(training_cfg(tmp_path, opts=KEYS))
    assert (
        "SOLVER.KEEP_BEST chooses by DATASETS.TEST, the set that final figures are reported on, so "
        "the figure of model_best.pth is too good; DATASETS.JSON.VALID names a validation set"
    ) in caplog.text


def test_a_metric_that_no_evaluation_gives_is_refused_with_what_there_is(tmp_path, monkeypatch):
    cfg = training_cfg(tmp_path, opts=(*KEYS, "SOLVER.KEEP_BEST", "bbox/mAP"))
    with pytest.raises(UserError) as error:
        FGDTrainer(cfg)
    assert str(error.value) == (
        "SOLVER.KEEP_BEST: 'bbox/mAP' is none of bbox/AP, bbox/AP50, bbox/AP75, bbox/APs, "
        "bbox/APm, bbox/APl, bbox/AP-square, bbox/AP-disc, bbox/AP-cross"
    )
    cfg.SOLVER.KEEP_BEST = "bbox/APs"
    with pytest.raises(UserError, match="gave no bbox/APs, only bbox/AP, bbox/AP50; set one of"):
        run(cfg, monkeypatch, (1.0,))


def test_the_names_are_those_of_a_real_evaluation(tmp_path):
    """Random weights at threshold 0 detect something."""
    opts = ("SOLVER.MAX_ITER", 2, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    cfg = training_cfg(tmp_path, opts=(*KEYS, *opts))
    job.train(cfg)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["bbox"]
    assert [f"bbox/{name}" for name in found] == metric_names(cfg)
    assert best_of(cfg)["best"]["figure"] == found["AP"]
    assert torch.isfinite(torch.tensor(found["AP"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("TEST.EVAL_PERIOD", 0), "SOLVER.KEEP_BEST bbox/AP: TEST.EVAL_PERIOD is 0, so nothing"),
        (("DATASETS.JSON.TEST", "", "DATASETS.TEST", ()), "bbox/AP: nothing is evaluated; DATA"),
    ],
)
def test_what_leaves_nothing_to_choose_by_is_refused(tmp_path, keys, message):
    cfg = training_cfg(tmp_path, opts=KEYS)
    cfg.merge_from_list(list(keys))
    with pytest.raises(UserError, match=message):
        check_solver(cfg)
