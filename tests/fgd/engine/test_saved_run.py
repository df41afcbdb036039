"""A run that was saved before methods had a room of their own goes on.

tests/fgd/saved_run holds what commit d570a71 left of a run of 8 steps (two 4-channel networks)
after 4 of them, and sum and norm of every tensor of its end, for boxes that are written as 4.0:
Detectron2 then cut boxes of whole numbers after a resize.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fgd.cli import main
from tests.fgd.training import write_dataset

SAVED = Path(__file__).parents[1] / "saved_run"


def test_it_is_resumed_to_the_same_end(tmp_path, monkeypatch, request):
    """The one change is the name of the data, which has a digest of where they lie."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the end was made: sums in another order move it
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data")
    for name in ("teacher.pth", "teacher.yaml", "config.yaml"):
        shutil.copy(SAVED / name, tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(SAVED / "model_0000003.pth", tmp_path / "out")
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000003.pth")
    assert main(["--config-file", "config.yaml", "--resume", "--allow-config-change"]) == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    (change,) = re.findall("than it began with: (.*). Its result", log)
    assert re.fullmatch(r"DATASETS.TRAIN: \['data_\w{8}'\] -> \['data_\w{8}'\]", change)
    start = torch.load(SAVED / "model_0000003.pth", weights_only=True)
    end = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    wanted = json.loads((SAVED / "end.json").read_text())
    assert len(wanted) == len(start["model"]) + len(start["distiller"])
    moved = 0
    for key, (total, norm) in wanted.items():
        part, _, name = key.partition(".")
        before, after = (x[part][name].double() for x in (start, end))
        scale = max(abs(norm), 1e-3)
        assert after.norm().item() == pytest.approx(norm, abs=1e-4 * scale), key
        assert after.sum().item() == pytest.approx(total, abs=1e-4 * scale * after.numel() ** 0.5)
        moved += (after - before).norm() > 1e-3 * scale
    assert moved > 20, "vacuous: the last steps changed nothing"
