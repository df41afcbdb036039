from types import SimpleNamespace

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from fgd.hooks import LogLevelTotals


def test_level_totals_reach_the_storage():
    model = nn.Module()
    model.distillation = nn.Module()
    model.distillation.level_totals = {"p3": torch.tensor(1.5), "p4": torch.tensor(0.25)}
    with EventStorage() as storage:
        hook = LogLevelTotals()
        hook.trainer = SimpleNamespace(model=model, storage=storage)
        hook.after_step()
        assert {k: v[0] for k, v in storage.latest().items()} == {"fgd/p3": 1.5, "fgd/p4": 0.25}


def test_a_plain_detector_logs_nothing():
    with EventStorage() as storage:
        hook = LogLevelTotals()
        hook.trainer = SimpleNamespace(model=nn.Linear(1, 1), storage=storage)
        hook.after_step()
        assert storage.latest() == {}
