import pytest
import torch
from detectron2.modeling import build_model

from fgd.distillation.distiller import Distiller
from fgd.distillation.features import Level
from fgd.distillation.methods import FGD
from fgd.distillation.teacher import FrozenTeacher
from fgd.errors import UserError
from fgd.loss.attention import channel_attention, spatial_attention
from fgd.loss.terms import Weights
from fgd.visualize import MapRecorder, level_maps


def make_distiller(tiny_cfg, mask_reference="padded"):
    student, teacher = build_model(tiny_cfg()), build_model(tiny_cfg(channels=24))
    levels = [Level("p3", 16, 24), Level("p4", 16, 24)]
    method = FGD(levels, Weights(1.0, 1.0, 1.0, 1.0), 0.5, mask_reference)
    return Distiller(
        student=student, teacher=FrozenTeacher(teacher, "BGR", "BGR"), distillation=method
    )


class Tap:
    """What the loss of each level really gets, and returns, behind the align convolution."""

    def __init__(self, method):
        self.calls = {}
        for name, loss in method.levels.items():
            loss.terms = self.around(name, loss.terms)

    def around(self, name, terms):
        def call(*args):
            result = terms(*args)
            self.calls[name] = [x.detach() for x in args[:4]], result
            return result

        return call


@pytest.mark.parametrize("mask_reference", ["padded", "image"])
def test_arrays_are_those_of_the_loss(tiny_cfg, make_batch, mask_reference):
    distiller, inputs = make_distiller(tiny_cfg, mask_reference), make_batch([(60, 90)])[0]
    distiller.train()
    tap = Tap(distiller.distillation)
    maps = level_maps(distiller, inputs)
    assert distiller.training and list(maps) == list(tap.calls) == ["p3", "p4"]
    for name, own in maps.items():
        (student, teacher, foreground, background), terms = tap.calls[name]
        assert own.padded_size == (64, 96)
        assert (own.foreground == foreground[0].numpy()).all() and own.foreground.max() > 0
        assert (own.background == background[0].numpy()).all() and own.background.max() > 0
        attention = own.student_attention, own.teacher_attention
        for array, features in zip(attention, (student, teacher)):
            assert (array == spatial_attention(features, 0.5)[0].numpy()).all()
        # The loss's own value, which the fused operation computes in another way.
        channels = [channel_attention(x, 0.5)[0].numpy() for x in (student, teacher)]
        value = abs(own.difference).sum() + abs(channels[0] - channels[1]).sum()
        assert terms["attention"].item() == pytest.approx(value, rel=1e-5)
        error = (student - teacher)[0].square().numpy() * channels[1][:, None, None]
        weighted = error.sum(axis=0) * own.teacher_attention
        for term in ("foreground", "background"):
            value = (weighted * getattr(own, term)).sum()
            assert terms[term].item() == pytest.approx(value, rel=1e-5)


def test_any_image_of_a_batch_in_training(tiny_cfg, make_batch):
    distiller, batch = make_distiller(tiny_cfg), make_batch()
    distiller.distillation.levels["p3"].align.requires_grad_(False)
    tap = Tap(distiller.distillation)
    with MapRecorder(distiller.distillation, image=1) as recorder:
        features, size = distiller.read_student(batch)
        losses = distiller.terms(features, batch, size)
    assert losses["loss_fgd_attention"].requires_grad
    (student, _, foreground, _), _ = tap.calls["p4"]
    assert (recorder.maps["p4"].foreground == foreground[1].numpy()).all()
    wanted = spatial_attention(student[1:], 0.5)[0].numpy()
    assert recorder.maps["p4"].student_attention == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(recorder.boxes, batch[1]["instances"].gt_boxes.tensor)
    distiller.terms(features, batch[::-1], size)  # no longer recorded
    assert torch.equal(recorder.boxes, batch[1]["instances"].gt_boxes.tensor)
    assert not distiller.distillation._forward_pre_hooks


def test_other_methods_have_no_such_maps():
    with pytest.raises(UserError, match="FGD's maps only; distillation is Linear"):
        MapRecorder(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="distillation is off"):
        MapRecorder(None)
