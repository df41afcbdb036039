import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from fgd.errors import UserError
from fgd.features import FeatureTap, Level, distilled_level_names, match_levels


def shapes(**levels):
    return {name: ShapeSpec(channels=c, stride=s) for name, (c, s) in levels.items()}


def test_default_levels_follow_the_paper(tiny_cfg):
    for student, names in (
        ("RetinaNet", ["p3", "p4", "p5", "p6", "p7"]),
        ("GeneralizedRCNN", ["p2", "p3", "p4", "p5"]),
    ):
        cfg = tiny_cfg(student)
        cfg.MODEL.DISTILLER.STUDENT = student
        assert distilled_level_names(cfg) == names
        cfg.MODEL.DISTILLER.LEVELS = ["p4"]
        assert distilled_level_names(cfg) == ["p4"]
    cfg.MODEL.DISTILLER.update(STUDENT="Other", LEVELS=[])
    with pytest.raises(UserError, match="Other has no default"):
        distilled_level_names(cfg)


def test_channels_may_differ():
    levels = match_levels(["p3"], shapes(p3=(64, 8), p4=(64, 16)), shapes(p3=(256, 8)))
    assert levels == [Level("p3", 64, 256)]


def test_strides_and_missing_levels_show_both_tables():
    student, teacher = shapes(p3=(64, 8), p4=(64, 16)), shapes(p3=(256, 4), p2=(256, 2))
    with pytest.raises(UserError, match="'p3' has different strides") as error:
        match_levels(["p3"], student, teacher)
    assert "64 / 8" in str(error.value) and "256 / 4" in str(error.value)
    with pytest.raises(UserError, match="'p4' is missing in the teacher"):
        match_levels(["p4"], student, teacher)
    with pytest.raises(UserError, match="'p9' is missing in the student and the teacher"):
        match_levels(["p9"], student, teacher)


class Doubling(nn.Module):
    def forward(self, x):
        return {"p3": x * 2}


def test_tap_hands_out_once_and_only_training_features():
    backbone = Doubling()
    tap = FeatureTap(backbone)
    backbone(torch.ones(1, 3, 4, 5))
    features, padded_size = tap.pop()
    assert features["p3"].unique().item() == 2 and padded_size == (4, 5)
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()
    backbone.eval()(torch.ones(1, 3, 4, 5))
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()
