"""The baseline is the same loss: equal to the literal reference and to this project's."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fgd.bench.per_box import PerBoxFGD, paint_masks
from fgd.methods.batch import Level
from fgd.methods.fgd.masks import cell_weights
from fgd.methods.fgd.terms import TERMS, FGDLevelLoss, Weights, composed_terms
from fgd.methods.method import over_levels
from tests import reference
from tests.fgd.methods.batches import make_batch
from tests.fgd.methods.fgd.test_terms import GOLDEN, load_golden, random, randomize

WEIGHTS = Weights(1.0, 0.5, 0.3, 0.2)
SIZE = (40, 64)  # of images, pixels
LEVELS = {"p3": (5, 8), "p4": (3, 4)}


def batch(boxes, channels=(3, 3), seed=0):
    """A batch in float64: two levels, the student's maps take gradients."""
    student = {
        name: random(len(boxes), channels[0], *size, seed=seed + i).requires_grad_()
        for i, (name, size) in enumerate(LEVELS.items())
    }
    teacher = {
        name: random(len(boxes), channels[1], *size, seed=seed + 50 + i)
        for i, (name, size) in enumerate(LEVELS.items())
    }
    return make_batch(student, teacher, boxes, SIZE)


def per_box(channels, temperature, seed=0):
    levels = [Level(name, *channels) for name in LEVELS]
    return randomize(PerBoxFGD(levels, WEIGHTS, temperature).double(), seed)


def ours(baseline, channels, temperature):
    """The same by `FGDLevelLoss`, whose masks are float64 here: the method's are float32."""
    levels = nn.ModuleDict(
        {n: FGDLevelLoss(*channels, WEIGHTS, temperature, composed_terms) for n in LEVELS}
    )
    module = nn.ModuleDict({"levels": levels}).double()
    module.load_state_dict(baseline.state_dict())

    def call(given):
        masks = lambda size: cell_weights(  # noqa: E731
            given.boxes, size, given.image_sizes, torch.float64
        )
        return {
            name: level(given.student[name], given.teacher[name], *masks(LEVELS[name]))
            for name, level in levels.items()
        }

    return module, call


x = st.floats(-16, 80, width=32)
side = st.floats(0, 60, width=32)


@settings(max_examples=15, deadline=None)
@given(
    boxes=st.lists(st.lists(st.tuples(x, x, side, side), max_size=6), min_size=1, max_size=2),
    channels=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    temperature=st.floats(0.2, 2.0),
    seed=st.integers(0, 99),
)
def test_equals_this_projects_loss_in_value_and_gradients(boxes, channels, temperature, seed):
    boxes = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    boxes = [torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], dim=1) for b in boxes]
    baseline = per_box(channels, temperature, seed)
    results = []
    for module, call in ((baseline, baseline), ours(baseline, channels, temperature)):
        given = batch(boxes, channels, seed)
        losses = over_levels(call(given))
        sum(losses.values()).backward()
        parameters = [p.grad for _, p in sorted(module.named_parameters())]
        gradients = [*(maps.grad for maps in given.student.values()), *parameters]
        results.append([losses[term].detach() for term in TERMS] + gradients)
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def test_equals_the_literal_reference():
    boxes = [torch.tensor([[4.0, 4, 20, 28], [10, 0, 47, 15]]), torch.zeros(0, 4)]
    method = per_box((2, 3), 0.5)
    given = batch(boxes, (2, 3))
    losses = over_levels(method(given))
    wanted = dict.fromkeys(TERMS, 0.0)
    for name, level in method.levels.items():
        maps = given.student[name], given.teacher[name]
        parameters = dict(level.named_parameters())
        terms = reference.terms(*maps, boxes, [SIZE] * 2, parameters, 0.5)
        for term in TERMS:
            wanted[term] += getattr(WEIGHTS, term) * float(torch.as_tensor(terms[term]).detach())
    for term in TERMS:
        assert losses[term].item() == pytest.approx(wanted[term], rel=1e-9)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: Path(p).stem)
def test_equals_the_authors_values_and_gradient(path):
    loss, tensor, _, boxes, sizes = load_golden(path, torch.float64, composed_terms)
    channels = tensor["student"].shape[1], tensor["teacher"].shape[1]
    method = PerBoxFGD([Level("p3", *channels)], loss.weights, loss.temperature).double()
    method.levels["p3"].load_state_dict(loss.state_dict())
    student = tensor["student"].clone().requires_grad_()
    maps = {"p3": student}, {"p3": tensor["teacher"]}
    total = sum(over_levels(method(make_batch(*maps, boxes, sizes[0]))).values())
    total.backward()
    assert (total - tensor["loss"]).abs() <= 1e-9 * tensor["loss"]
    assert (student.grad - tensor["grad_student"]).norm() <= 1e-9 * tensor["grad_student"].norm()


def test_masks_of_boxes_outside_and_over_everything():
    boxes = [
        torch.tensor([[-30.0, -30, -9, -9], [60, 30, 90, 50]]),  # one is off the map
        torch.tensor([[0.0, 0, 64, 40]]),
    ]
    like = torch.zeros(1, dtype=torch.float64)
    actual = paint_masks(boxes, (5, 8), SIZE, like)
    for mask, wanted in zip(actual, reference.masks(boxes, (5, 8), [SIZE] * 2), strict=True):
        torch.testing.assert_close(mask, wanted, rtol=1e-12, atol=0)
    assert actual[1][1].sum() == 0 and actual[0][0].count_nonzero() == 2
