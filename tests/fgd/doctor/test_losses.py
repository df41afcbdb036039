import copy

import pytest
import torch
from detectron2.modeling import build_model

from fgd.data.stream import build_train_stream
from fgd.distillation import taps
from fgd.doctor.losses import (
    Measured,
    check_gradients,
    check_losses,
    loss_table,
    measure,
    suggested_factor,
)
from fgd.errors import UserError

from .clinic import distilled_cfg


def measured(detection=(1.0, 0.5), levels=((3.0, 1.0), (1.0, 1.0))):
    return Measured(
        {f"loss_{i}": value for i, value in enumerate(detection)},
        {f"p{3 + i}": dict(zip(("fore", "back"), terms)) for i, terms in enumerate(levels)},
    )


def test_the_suggested_factor_by_hand():
    """Levels' totals 4 and 2, mean 3; of two detection losses the smaller one counts."""
    assert suggested_factor(measured()) == 0.17  # 0.5 / 3, two digits
    assert suggested_factor(measured(detection=(9.0, 0.3, 0.01, 0.6))) == 0.1  # 0.3 of four
    assert suggested_factor(measured(detection=(50.0,))) == 0.67  # no more than 2 / 3
    assert suggested_factor(measured(detection=(1e-3,))) == 0.033  # no less than 0.1 / 3
    for bad in (measured(levels=((0.0, 0.0),)), measured(levels=((float("inf"),),))):
        assert suggested_factor(bad) == 0
    assert suggested_factor(measured(detection=(float("nan"), 1.0))) == 0


@pytest.mark.parametrize(
    "factor, verdict, advice",
    [
        (0.17, "ok", ""),
        (0.5, "ok", "nothing; MODEL.DISTILLER.FACTOR 0.17 (now 0.5) would make them equal"),
        (0.06, "ok", "nothing; MODEL.DISTILLER.FACTOR 0.17 (now 0.06) would make them equal"),
        (1.0, "warning", "start from MODEL.DISTILLER.FACTOR 0.17 (now 1); --balance does"),
        (0.01, "warning", "start from MODEL.DISTILLER.FACTOR 0.17 (now 0.01); --balance does"),
    ],
)
def test_within_a_factor_of_three_is_comparable(factor, verdict, advice):
    finding = check_losses(measured(), factor, 10)
    assert (finding.verdict, finding.advice) == (verdict, advice)


def test_nothing_and_infinity_are_faults():
    assert "every distillation term is 0" in check_losses(measured(), 0.0, 1).advice
    assert "not finite" in check_losses(measured(levels=((float("nan"),),)), 1.0, 1).advice


def test_the_table_is_at_the_factor():
    lines = loss_table(measured(), 0.5).splitlines()
    assert lines[0] == "Distillation, weighted, at factor 0.5:"
    assert lines[1].split() == ["level", "fore", "back", "total"]
    assert lines[3].split() == ["p3", "1.5", "0.5", "2"]
    assert lines[-1] == "Detection: loss_0 1, loss_1 0.5"


def test_gradients_that_do_not_arrive():
    def check(value, norm):
        return check_gradients(
            Measured(values={"a": 1.0, "b": value}, gradients={"a": 1.0, "b": norm})
        )

    assert check(1.0, 0.5).verdict == "ok"
    assert check(0.0, 0.0).verdict == "ok", "a term that is 0, of weight 0 or without boxes"
    assert "b is 1 but moves nothing" in check(1.0, 0.0).found
    assert "gradient of b is nan" in check(1.0, float("nan")).found


@pytest.fixture
def patient(teacher_file, tmp_path):
    """A Distiller before its first step, and three batches."""
    cfg = distilled_cfg(tmp_path, teacher_file, ("MODEL.DISTILLER.SCHEDULE.WARMUP_ITERS", 1))
    return build_model(cfg).train(), build_train_stream(cfg).first_batches(3)


def test_measured_means_are_those_of_the_losses(patient):
    model, batches = patient
    before = copy.deepcopy(model.state_dict())
    all_three = measure(model, batches)
    each = [measure(model, [batch]) for batch in batches]
    for level, terms in all_three.levels.items():
        for term, value in terms.items():
            assert value == pytest.approx(sum(x.levels[level][term] for x in each) / 3, rel=1e-4)
    # What the loss dict has is the sum over levels, whatever the schedule says of iteration 0.
    first = each[0]
    for name, value in first.values.items():
        term = name.removeprefix("loss_")
        assert value == pytest.approx(sum(x[term] for x in first.levels.values()), rel=1e-5)
        assert first.gradients[name] > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_gradient_is_measured_in_the_backbone_of_the_student(patient):
    model, batches = patient
    found = measure(model, batches[:1]).gradients
    scaled = measure(model, batches[:1], half=False)
    assert found == scaled.gradients, "measuring leaves nothing behind that changes the next one"
    model.student.backbone.bottom_up.requires_grad_(False)
    in_the_neck = measure(model, batches[:1]).gradients
    assert in_the_neck.keys() == found.keys() and in_the_neck != found
    model.student.backbone.requires_grad_(False)
    assert set(measure(model, batches[:1]).gradients.values()) == {0.0}


def test_grids_that_differ_are_said(patient, monkeypatch):
    model, batches = patient
    pop = taps.FeatureTap.pop

    def cropped(self):
        features, size = pop(self)
        return {k: v[:, :, 1:] if k == "p3" else v for k, v in features.items()}, size

    monkeypatch.setattr(taps.FeatureTap, "pop", cropped)
    with pytest.raises(
        UserError, match="'p3' has a grid of 7x8 cells, the teacher's 'p3' one of 8x8"
    ):
        measure(model, batches[:1])
    assert not model.table and model.training
