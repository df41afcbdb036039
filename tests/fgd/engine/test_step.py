"""No rank steps with a bad loss, and what is known about it is kept."""

import copy
import json
from pathlib import Path

import pytest
import torch
from detectron2.engine.train_loop import HookBase
from torch import nn

from fgd.engine.step import (
    MAX_SKIPPED,
    RunningStatistics,
    SkipsCounted,
    StepTogether,
    check_together,
)
from fgd.engine.trainer import FGDTrainer
from fgd.errors import DivergedError
from tests.fgd.training import distilled, training_cfg


class PoisonAt(HookBase):
    """Makes the loss of one iteration NaN, by a batch norm that is fed NaN as well."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            model = self.trainer.model
            forward = model.forward

            def poisoned(batch):
                for sample in batch:
                    sample["image"] = sample["image"] * torch.nan
                return {k: v * torch.nan for k, v in forward(batch).items()}

            model.forward = poisoned


def diverge(cfg, iteration):
    """The trainer, the error, and the model's state after each step that was taken."""
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([PoisonAt(iteration)])
    states = []
    trainer.optimizer.register_step_post_hook(
        lambda *_: states.append(copy.deepcopy(trainer.model.state_dict()))
    )
    with pytest.raises(DivergedError) as error:
        trainer.train()
    return trainer, error.value, states


def test_nan_loss_stops_without_a_step(tmp_path, caplog):
    cfg = training_cfg(tmp_path)
    trainer, error, states = diverge(cfg, 5)
    text = str(error)
    assert "iteration 5: a loss became infinite or NaN (loss_cls nan, loss_box_reg nan)" in text
    assert "BASE_LR" in text and "\n" not in text and error.exit_code == 3
    assert len(states) == 5
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, states[-1][name]) for name, p in trained.items())
    images = json.loads(Path(cfg.DATASETS.JSON.TRAIN).read_text())["images"]
    named = [x for x in images if f"{x['file_name']} (id {x['id']})" in text]
    assert len(named) == 2 and all(f"(id {x['id']})" in caplog.text for x in named)
    assert "Losses and images of rank 0" in caplog.text


def test_weights_of_before_are_kept_and_not_resumed_from(tmp_path):
    """Batch norm's averages too, which the bad forward pass has changed to NaN by then."""
    cfg = training_cfg(tmp_path)
    _, error, states = diverge(cfg, 5)
    folder = Path(cfg.OUTPUT_DIR)
    names = sorted(x.name for x in folder.glob("*.pth"))
    assert names == ["model_0000003.pth", "model_diverged_0000005.pth"]
    assert f"Weights before this step: {folder / names[1]}" in str(error)
    saved = torch.load(folder / names[1], weights_only=True)
    assert saved["iteration"] == 4 and "trainer" not in saved
    averages = [name for name in saved["model"] if "running_" in name]
    assert len(averages) > 10
    assert saved["model"].keys() == states[-1].keys()
    assert all(torch.equal(value, states[-1][name]) for name, value in saved["model"].items())
    resumed = FGDTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4


def test_running_statistics_come_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    statistics = RunningStatistics(model)
    model(torch.randn(2, 3, 5, 5))
    before = copy.deepcopy(model.state_dict())
    statistics.keep()
    model(torch.full((2, 3, 5, 5), torch.nan))
    assert model[1].running_mean.isnan().all()
    statistics.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    RunningStatistics(nn.Linear(1, 1)).keep()  # none is fine


def test_divergence_found_by_detectron2_itself_counts_too(tmp_path, monkeypatch):
    trainer = FGDTrainer(training_cfg(tmp_path))

    def forward(batch):
        raise FloatingPointError("Predicted boxes contain Inf/NaN.\nTraining has diverged.")

    monkeypatch.setattr(trainer.model, "forward", forward)
    with pytest.raises(DivergedError, match="iteration 0: Predicted boxes contain Inf/NaN. Train"):
        trainer.train()
    assert (tmp_path / "out" / "model_diverged_0000000.pth").exists()


@pytest.mark.parametrize("distil", [False, True])
def test_a_learning_rate_of_1e12_is_caught(tmp_path, distil):
    cfg = training_cfg(tmp_path, opts=("SOLVER.BASE_LR", 1e12, "SOLVER.WARMUP_ITERS", 0))
    cfg = distilled(cfg, tmp_path) if distil else cfg
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    with pytest.raises(DivergedError, match=r"iteration [12]: .*\(loss_cls .*; images: .*id \d"):
        trainer.train()


def test_a_full_disk_does_not_hide_the_divergence(tmp_path, monkeypatch):
    cfg = training_cfg(tmp_path)
    trainer = FGDTrainer(cfg)
    trainer.register_hooks([PoisonAt(0)])

    def full(iteration):
        raise OSError("cannot write: No space left on device")

    monkeypatch.setattr(trainer.checkpointer, "save_diverged", full)
    with pytest.raises(DivergedError, match="could not be saved .*No space left.*Usual causes"):
        trainer.train()


def test_step_trainer_fits_both_versions_of_detectron2():
    """main's ``_write_metrics`` has one parameter more than v0.6's."""

    class OnMain:
        calls = []

        def _write_metrics(self, loss_dict, data_time, prefix="", iter=None):
            self.calls.append((loss_dict, data_time, prefix, iter))

    class Step(StepTogether, OnMain):
        pass

    losses = {"a": torch.tensor(1.0)}
    Step()._write_metrics(losses, 0.5, iter=3)
    assert OnMain.calls == [(losses, 0.5, "", 3)]
    with pytest.raises(DivergedError):
        Step()._write_metrics({"a": torch.tensor(torch.nan)}, 0.5)
    assert len(OnMain.calls) == 1


def test_check_looks_at_the_sum():
    check_together({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    with pytest.raises(DivergedError, match=r"\(a 1, b inf\)"):
        check_together({"a": torch.tensor(1.0), "b": torch.tensor(torch.inf)})


class AMPOnCPU:
    """Detectron2's AMP step without CUDA: the same calls in the same order."""

    def __init__(self, overflows):
        self.weight = nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.0)
        self.grad_scaler = torch.amp.GradScaler("cpu")
        self.overflows = iter(overflows)

    def run_step(self):
        loss = self.weight.sum()  # finite throughout; its scale starts at 2**16
        self.optimizer.zero_grad()
        self.grad_scaler.scale(loss).backward()
        if next(self.overflows):
            self.weight.grad.fill_(torch.inf)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


class CountedOnCPU(SkipsCounted, AMPOnCPU):
    pass


def test_skipped_steps_are_normal_until_there_is_nothing_else():
    step = CountedOnCPU([True] * (MAX_SKIPPED - 1) + [False] + [True] * MAX_SKIPPED)
    for _ in range(2 * MAX_SKIPPED - 1):
        step.run_step()
    assert step.skipped == MAX_SKIPPED - 1
    with pytest.raises(DivergedError, match=f"skipped {MAX_SKIPPED} steps in a row.*1.19e-07"):
        step.run_step()
    assert not step.optimizer._optimizer_step_post_hooks, "hooks pile up"
