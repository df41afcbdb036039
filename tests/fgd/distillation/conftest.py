"""Teachers of the table that are tiny."""

import pytest
import torch
from detectron2.config import instantiate

from fgd.distillation import lazy_teacher, lazy_zoo

from .lazy_teachers import TINY, randomize, taught


@pytest.fixture
def table(monkeypatch):
    """The table has them too; no code is trusted."""
    for kind, entry in TINY.items():
        monkeypatch.setitem(lazy_zoo.TEACHERS, kind, entry)
    monkeypatch.setattr(lazy_teacher, "_TRUSTED", set())


@pytest.fixture
def distilled_by(tmp_path, table):
    """``distilled_by(kind, cfg)``: the config under "lazy:<kind>" with random weights in a file."""

    def make(kind, cfg):
        model = randomize(instantiate(TINY[kind].describe()))
        torch.save({"model": model.state_dict()}, tmp_path / f"{kind}.pth")
        return taught(cfg, kind, str(tmp_path / f"{kind}.pth"))

    return make
