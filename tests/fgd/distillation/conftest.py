"""Teachers of the table that are tiny."""

import pytest
import torch
from detectron2.config import instantiate

from fgd.distillation import lazy_zoo

from .lazy_teachers import TINY, randomize, taught


@pytest.fixture
def distilled_by(tmp_path, monkeypatch):
    """``distilled_by(kind, cfg)``: the config under "lazy:<kind>" with random weights in a file."""

    def make(kind, cfg):
        monkeypatch.setitem(lazy_zoo.TEACHERS, kind, TINY[kind])
        model = randomize(instantiate(TINY[kind].describe()))
        torch.save({"model": model.state_dict()}, tmp_path / f"{kind}.pth")
        return taught(cfg, kind, str(tmp_path / f"{kind}.pth"))

    return make
