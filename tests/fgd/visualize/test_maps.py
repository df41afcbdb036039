import pytest
import torch
from detectron2.modeling import build_model

from fgd.distillation.distiller import Distiller
from fgd.distillation.teacher import FrozenTeacher
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.fgd.attention import channel_attention, spatial_attention
from fgd.methods.fgd.method import FGD
from fgd.methods.fgd.terms import Weights
from fgd.visualize import PictureRecorder, record_pictures


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
    recorded = record_pictures(distiller, inputs)
    with torch.no_grad():
        distiller.terms(distiller.batch(distiller.eval().read_student([inputs]), [inputs]))
    distiller.train()
    assert distiller.training and list(recorded.pictures) == list(tap.calls) == ["p3", "p4"]
    assert recorded.padded_size == (64, 96)
    for name, pictures in recorded.pictures.items():
        (student, teacher, foreground, background), terms = tap.calls[name]
        own = {caption: picture.values for caption, picture in pictures.items()}
        assert (own["foreground"] == foreground[0].numpy()).all() and own["foreground"].max() > 0
        assert (own["background"] == background[0].numpy()).all() and own["background"].max() > 0
        for who, features in (("student", student), ("teacher", teacher)):
            wanted = spatial_attention(features, 0.5)[0].numpy()
            assert (own[f"{who} attention"] == wanted).all()
        # The loss's own value, which the fused operation computes in another way.
        channels = [channel_attention(x, 0.5)[0].numpy() for x in (student, teacher)]
        value = abs(own["difference"]).sum() + abs(channels[0] - channels[1]).sum()
        assert terms["attention"].item() == pytest.approx(value, rel=1e-5)
        error = (student - teacher)[0].square().numpy() * channels[1][:, None, None]
        weighted = error.sum(axis=0) * own["teacher attention"]
        for term in ("foreground", "background"):
            value = (weighted * own[term]).sum()
            assert terms[term].item() == pytest.approx(value, rel=1e-5)


def test_any_image_of_a_batch_in_training(tiny_cfg, make_batch):
    distiller, batch = make_distiller(tiny_cfg), make_batch()
    distiller.distillation.levels["p3"].align.requires_grad_(False)
    tap = Tap(distiller.distillation)
    seen = distiller.read_student(batch)
    with PictureRecorder(distiller, image=1) as recorder:
        table = distiller.terms(distiller.batch(seen, batch))
    assert table["p4"]["fgd_attention"].requires_grad
    (student, _, foreground, _), _ = tap.calls["p4"]
    pictures = recorder.pictures["p4"]
    assert (pictures["foreground"].values == foreground[1].numpy()).all()
    wanted = spatial_attention(student[1:], 0.5)[0].numpy()
    assert pictures["student attention"].values == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(recorder.boxes, batch[1]["instances"].gt_boxes.tensor)
    distiller.terms(distiller.batch(seen, batch[::-1]))  # no longer recorded
    assert torch.equal(recorder.boxes, batch[1]["instances"].gt_boxes.tensor)


def test_without_a_method_there_is_nothing_to_draw(tiny_cfg):
    distiller = make_distiller(tiny_cfg)
    distiller.distillation = None
    with pytest.raises(UserError, match="distillation is off"):
        record_pictures(distiller, {})
