import logging
from pathlib import Path

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fgd.engine.average import Average
from fgd.engine.solver import check_solver
from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from fgd.processes.launch import launch
from tests.fgd.processes import ranks
from tests.fgd.training import assert_equal, distilled, training_cfg

from .test_trainer import begin_second, load, train

FIRST = 1 - (1 / 10)  # what the warm-up takes of the weights that iteration 0 has ended with


def make_model():
    """A tied weight, batch norm, a frozen one, and a frozen layer."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), FrozenBatchNorm2d(2))
    model.append(nn.Linear(2, 2)).append(nn.Linear(2, 2))
    model[4].weight = model[0].weight
    return model.requires_grad_(True)


@given(
    decay=st.floats(0.01, 0.9999),
    values=st.lists(st.floats(-100, 100), min_size=2, max_size=30),
    start=st.integers(0, 10**6),
)
def test_it_is_the_average_of_its_formula(decay, values, start):
    module = nn.Module()
    module.register_parameter("x", nn.Parameter(torch.tensor(values[0])))
    average, expected = Average(module, decay), values[0]
    for iteration, value in enumerate(values[1:], start):
        module.x.data.fill_(value)
        average.update(iteration)
        kept = min(decay, (1 + iteration) / (10 + iteration))
        expected = kept * expected + (1 - kept) * value
    assert average.state_dict()["x"].item() == pytest.approx(expected, abs=1e-3)


def test_statistics_are_averaged_and_frozen_weights_are_the_students_own():
    model = make_model()
    model[2].requires_grad_(False)
    average = Average(model, 0.5)
    names = set(average.state_dict())
    assert not names & {"2.weight", "2.bias", "1.num_batches_tracked"}
    assert names >= {"0.weight", "4.weight", "1.weight", "1.running_mean", "1.running_var"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in {x.data_ptr(): x for x in model.state_dict().values()}.values():
            value.add_(1)
    average.update(0)
    for name, value in average.state_dict().items():
        assert torch.allclose(value, before[name] + FIRST), name
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = {name: value.clone() for name, value in average.state_dict().items()}
    with average.in_use():
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert_equal(inside, {**trained, **averaged})
    assert inside["1.num_batches_tracked"] == 1 and torch.equal(
        inside["2.weight"], before["2.weight"] + 1
    )
    assert_equal(dict(model.state_dict()), trained)
    assert_equal(average.state_dict(), averaged)


@pytest.mark.parametrize("distil", [False, True])
def test_a_resumed_run_is_bit_equal_and_what_is_saved_was_evaluated(distil, tmp_path, monkeypatch):
    """8 steps against 4 + 4, with batch norms that are trained."""
    clip = ("CLIP_TYPE", "full_model", "CLIP_VALUE", 1.0, "ENABLED", True)
    opts = [f"SOLVER.CLIP_GRADIENTS.{x}" if i % 2 == 0 else x for i, x in enumerate(clip)]
    opts += ["SOLVER.EMA_DECAY", 0.6, "TEST.EVAL_PERIOD", 4]
    cfg = training_cfg(tmp_path, opts=opts)
    if distil:
        cfg = distilled(cfg, tmp_path)
    evaluated = []

    def test(cls, cfg, model, evaluators=None):
        student = getattr(model, "student", model)
        evaluated.append({name: value.clone() for name, value in student.state_dict().items()})
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(FGDTrainer, "test", classmethod(test))
    trainer = train(cfg)
    first = Path(cfg.OUTPUT_DIR)
    for name, weights in zip(("model_0000003", "model_final"), evaluated, strict=True):
        assert_equal(weights, dict(load(first / f"{name}.pth")["model"]))
    begin_second(cfg, tmp_path / "second")
    assert train(cfg, resume=True).start_iter == 4
    a, b = (load(folder / "model_final.pth") for folder in (first, tmp_path / "second"))
    for key in ("config", "full_config"):  # OUTPUT_DIR differs
        del a[key], b[key]
    assert_equal(a, b)
    student = getattr(trainer.model, "student", trainer.model).state_dict()
    assert_equal({name: student[name] for name in a["raw"]}, a["raw"])
    moved = [name for name, value in a["raw"].items() if not torch.equal(value, a["model"][name])]
    assert len(moved) > 10 and any("running_var" in name for name in moved)
    cfg.SOLVER.EMA_DECAY, cfg.OUTPUT_DIR = 0.0, str(tmp_path / "plain")
    train(cfg)
    assert_equal(
        dict(load(tmp_path / "plain" / "model_final.pth")["model"]), {**a["model"], **a["raw"]}
    )


def test_off_costs_nothing(tmp_path):
    trainer = FGDTrainer(training_cfg(tmp_path))
    assert trainer.average is None
    trainer.checkpointer.save("model_0000000", iteration=0)
    assert "raw" not in load(tmp_path / "out" / "model_0000000.pth")


def test_switched_off_a_run_goes_on_with_what_was_trained_and_an_ended_one_with_its_model(tmp_path):
    cfg = training_cfg(tmp_path, opts=("SOLVER.EMA_DECAY", 0.9, "SOLVER.MAX_ITER", 2))
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.DATASETS.TEST = ()
    train(cfg)
    final = load(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    cfg.SOLVER.EMA_DECAY = 0.0
    for iterations, expected in ((2, final["model"]), (3, {**final["model"], **final["raw"]})):
        cfg.SOLVER.MAX_ITER = iterations
        trainer = FGDTrainer(cfg)
        trainer.resume_or_load(resume=True, allow_changes=True)
        assert_equal(dict(trainer.model.state_dict()), dict(expected))
    with pytest.raises(UserError, match="SOLVER.EMA_DECAY: 0.9 -> 0.0. .*--allow-config-change"):
        FGDTrainer(cfg).resume_or_load(resume=True)


def test_switched_on_it_begins_with_the_weights_of_then(tmp_path, caplog):
    cfg = training_cfg(tmp_path)
    trainer = FGDTrainer(cfg)
    trainer.checkpointer.save("model_0000003", iteration=3)
    cfg.SOLVER.EMA_DECAY = 0.9
    caplog.set_level(logging.WARNING, "fgd")
    resumed = FGDTrainer(cfg)
    resumed.resume_or_load(resume=True, allow_changes=True)
    assert "SOLVER.EMA_DECAY: 0.0 -> 0.9" in caplog.text
    own = resumed.model.state_dict()
    assert_equal(resumed.average.state_dict(), {x: own[x] for x in resumed.average.state_dict()})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay, tmp_path):
    cfg = training_cfg(tmp_path, opts=("SOLVER.EMA_DECAY", decay))
    with pytest.raises(UserError) as error:
        check_solver(cfg)
    assert str(error.value) == (
        f"SOLVER.EMA_DECAY: {decay} is not in [0, 1); customary are 0.999 to 0.9999, 0 is off"
    )


def test_batch_norms_are_not_measured_for_other_weights(tmp_path):
    opts = ("SOLVER.EMA_DECAY", 0.9, "TEST.PRECISE_BN.ENABLED", True)
    with pytest.raises(UserError, match="SOLVER.EMA_DECAY 0.9: TEST.PRECISE_BN measures batch"):
        check_solver(training_cfg(tmp_path, opts=opts))


def test_two_processes_have_one_average_and_one_best(tmp_path):
    opts = ("SOLVER.EMA_DECAY", 0.5, "SOLVER.KEEP_BEST", "bbox/AP", "TEST.EVAL_PERIOD", 1)
    cfg = training_cfg(tmp_path, opts=(*opts, "SOLVER.MAX_ITER", 2))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = (str(tmp_path / "config.yaml"),)
    assert launch(ranks.average, arguments, device="cpu", processes=2) == 0
    a, b = (load(tmp_path / f"average{i}.pth") for i in range(2))
    differ = [name for name, value in a.items() if not torch.equal(value, b[name])]
    assert differ and all(".running_" in name for name in differ)  # of its own images, as ever
    final, best = (load(tmp_path / "out" / f"model_{x}.pth") for x in ("final", "best"))
    assert_equal({name: final["model"][name] for name in a}, a)
    assert best["best"]["figure"] == 1.0 and best["iteration"] == 0 and len(best["rng"]) == 2
