from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine.train_loop import HookBase
from matplotlib.figure import Figure

from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from fgd.visualize.hook import LogPictures, picture_hooks, rendered
from tests.fgd.engine.test_trainer import assert_equal, load
from tests.fgd.training import distilled, training_cfg


class Images(HookBase):
    """Names and iterations of the pictures that wait for TensorBoard."""

    def __init__(self):
        self.seen = []

    def after_step(self):
        storage = self.trainer.storage
        self.seen += [(iteration, image.shape[0]) for _, image, iteration in storage._vis_data]
        storage.clear_images()


def train(cfg, folder, *opts):
    cfg = cfg.clone()
    cfg.merge_from_list(["OUTPUT_DIR", str(folder), *opts])
    Path(cfg.OUTPUT_DIR).mkdir()
    torch.manual_seed(1)
    trainer = FGDTrainer(cfg, picture_hooks(cfg))
    trainer.resume_or_load(resume=False)
    images = Images()
    trainer.register_hooks([images])
    trainer.train()
    return images.seen, load(folder / "model_final.pth"), trainer


def test_training_is_bit_equal_with_and_without_pictures(tmp_path):
    opts = ("SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (4,))
    cfg = distilled(training_cfg(tmp_path, opts=opts), tmp_path)
    cfg.MODEL.DISTILLER.SCHEDULE.STOP = 4
    cfg.MODEL.DISTILLER.FACTOR = 0.01  # of an untrained teacher
    none, plain, _ = train(cfg, tmp_path / "plain")
    key = "MODEL.DISTILLER.PICTURE_PERIOD"
    pictures, looked_at, trainer = train(cfg, tmp_path / "pictures", key, 2)
    often, *_ = train(cfg, tmp_path / "often", key, 1)
    assert none == [] and pictures == [(1, 3), (3, 3)]
    assert [iteration for iteration, _ in often] == [0, 1, 2, 3]  # in 4 nothing is distilled
    for file in (plain, looked_at):
        del file["config"], file["full_config"]
    assert_equal(plain, looked_at)
    assert not trainer.model._forward_pre_hooks and trainer.model.watch is None


def test_it_is_off_by_default_and_on_other_ranks(tmp_path, monkeypatch):
    cfg = training_cfg(tmp_path)
    cfg.MODEL.DISTILLER.PICTURE_PERIOD = 3
    assert picture_hooks(cfg) == []  # a plain detector
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    (hook,) = picture_hooks(cfg)
    assert isinstance(hook, LogPictures) and hook.period == 3 and hook.image_format == "BGR"
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    assert picture_hooks(cfg) == []
    monkeypatch.undo()
    cfg.MODEL.DISTILLER.PICTURE_PERIOD = 0
    assert picture_hooks(cfg) == []


def test_a_period_needs_a_method(tmp_path):
    cfg = distilled(training_cfg(tmp_path), tmp_path)
    cfg.MODEL.DISTILLER.update(METHOD="", INHERIT=True, PICTURE_PERIOD=5)
    with pytest.raises(UserError, match="PICTURE_PERIOD: 5 must be 0"):
        FGDTrainer(cfg)


def test_rendered_is_what_tensorboard_takes():
    figure = Figure(figsize=(2, 1), dpi=50, facecolor="red")
    image = rendered(figure)
    assert image.shape == (3, 50, 100) and image.dtype == np.uint8
    assert image[:, 0, 0].tolist() == [255, 0, 0]
