"""Images without a box: in some places of a batch, in all, and in a run that keeps them."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgd.data.stream import build_train_stream
from fgd.engine.trainer import FGDTrainer
from tests.fgd.data.test_stream import take
from tests.fgd.training import distilled, training_cfg


@pytest.mark.parametrize("empty", [(1,), (0, 1)], ids=["one", "all"])
@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_losses_are_finite_and_reach_every_parameter(arch, empty, tmp_path, make_batch):
    """Every one, because DDP waits for the gradients of all."""
    model = build_model(distilled(training_cfg(tmp_path, arch), tmp_path))
    batch = make_batch()
    for i in empty:
        batch[i]["instances"] = batch[i]["instances"][:0]
    with EventStorage():
        losses = model(batch)
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_fgd_foreground"].requires_grad
    assert (losses["loss_fgd_foreground"] == 0) == (len(empty) == 2)
    assert losses["loss_fgd_background"] > 0
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_run_that_keeps_them_trains(tmp_path):
    cfg = training_cfg(tmp_path)
    path = Path(cfg.DATASETS.JSON.TRAIN)
    content = json.loads(path.read_text())
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in (0, 1)]
    path.write_text(json.dumps(content))
    opts = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "SOLVER.MAX_ITER", 7)
    opts += ("SOLVER.BASE_LR", 1e-4)
    cfg = distilled(training_cfg(tmp_path, opts=opts), tmp_path)
    boxes = [[len(x["instances"]) for x in b] for b in take(build_train_stream(cfg), 6)]
    assert [0, 0] in boxes and any(0 in pair and 2 in pair for pair in boxes), boxes
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
