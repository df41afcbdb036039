from types import SimpleNamespace

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from fgd.engine.hooks import LogLevelTotals


def test_level_totals_reach_the_storage_times_the_factor():
    model = nn.Module()
    model.factor = 0.5
    model.distillation = nn.Module()
    model.table = {
        "p3": {"a": torch.tensor(1.0), "b": torch.tensor(0.5)},
        "p4": {"a": torch.tensor(0.25)},
    }
    with EventStorage() as storage:
        hook = LogLevelTotals()
        hook.trainer = SimpleNamespace(model=model, storage=storage)
        hook.after_step()
        logged = {k: v[0] for k, v in storage.latest().items()}
        assert storage.smoothing_hints()["distillation_factor"] is False
    assert logged == {"distillation_factor": 0.5, "distill/p3": 0.75, "distill/p4": 0.125}


def test_a_plain_detector_logs_nothing():
    with EventStorage() as storage:
        hook = LogLevelTotals()
        hook.trainer = SimpleNamespace(model=nn.Linear(1, 1), storage=storage)
        hook.after_step()
        assert storage.latest() == {}
