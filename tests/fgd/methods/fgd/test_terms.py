import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.methods.fgd.fused import fused_terms
from fgd.methods.fgd.masks import cell_weights
from fgd.methods.fgd.terms import TERMS, FGDLevelLoss, GlobalContext, Weights, composed_terms
from tests import reference

GOLDEN = sorted((Path(__file__).parents[3] / "golden" / "fgd").glob("*.npz"))
# The authors' parameter names and ours.
NAMES = {
    "align": "align",
    "conv_mask_s": "context_student.mask_conv",
    "conv_mask_t": "context_teacher.mask_conv",
    "channel_add_conv_s": "context_student.transform",
    "channel_add_conv_t": "context_teacher.transform",
}
UNIT = Weights(1.0, 1.0, 1.0, 1.0)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def randomize(module, seed=0):
    """Parameters away from their initial values, where the context blocks are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


@functools.cache
def load_golden(path, dtype, terms):
    content = np.load(path)
    tensor = {k: torch.from_numpy(content[k]).to(dtype) for k in content.files}
    weights = Weights(*(float(content[k]) for k in ("alpha", "beta", "gamma", "lambda_")))
    channels = tensor["student"].shape[1], tensor["teacher"].shape[1]
    loss = FGDLevelLoss(*channels, weights, float(content["temperature"]), terms).to(dtype)
    rename = lambda key: key.replace(key.split(".")[0], NAMES[key.split(".")[0]], 1)  # noqa: E731
    parameters = {rename(k[6:]): v for k, v in tensor.items() if k.startswith("param/")}
    loss.load_state_dict(parameters)
    gradients = {rename(k[5:]): v for k, v in tensor.items() if k.startswith("grad/")}
    boxes = [b.double() for b in tensor["boxes"].split(content["num_boxes"].tolist())]
    size = tuple(content["image_size"].tolist())
    return loss, tensor, gradients, boxes, [size] * len(boxes)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("terms", [fused_terms, composed_terms])
def test_golden_value_and_gradients(path, dtype, tolerance, terms):
    loss, tensor, gradients, boxes, sizes = load_golden(path, dtype, terms)
    student = tensor["student"].clone().requires_grad_()
    loss.zero_grad()
    masks = cell_weights(boxes, student.shape[-2:], sizes, dtype)
    total = sum(loss(student, tensor["teacher"], *masks).values())
    total.backward()

    def close(actual, wanted):
        assert (actual - wanted).norm() <= tolerance * wanted.norm().clamp(min=1e-12)

    close(total.detach(), tensor["loss"])
    close(student.grad, tensor["grad_student"])
    assert gradients.keys() == dict(loss.named_parameters()).keys()
    for name, parameter in loss.named_parameters():
        if name.endswith("mask_conv.bias"):  # shifts a softmax: zero but for rounding
            assert parameter.grad.abs() < 1e-4 * gradients[name.replace("bias", "weight")].norm()
        else:
            close(parameter.grad, gradients[name])


def test_there_are_five_golden_cases():
    assert len(GOLDEN) == 5


def golden_vector():
    i = torch.arange(2 * 4 * 5 * 6, dtype=torch.float64)
    student = (torch.sin(0.37 * i + 1.0) + 0.1).view(2, 4, 5, 6)
    teacher = (torch.sin(0.37 * i + 2.0) + 0.2).view(2, 4, 5, 6)
    boxes = [torch.tensor([[4.0, 4, 20, 28], [10, 0, 47, 15]]), torch.zeros(0, 4)]
    return student, teacher, cell_weights(boxes, (5, 6), [(40, 48)] * 2, torch.float64)


def test_golden_vector():
    student, teacher, masks = golden_vector()
    loss = FGDLevelLoss(4, 4, UNIT).double()
    terms = loss(student, teacher, *masks)
    assert terms["foreground"].item() == pytest.approx(1.31411473174221, rel=1e-13)
    assert terms["background"].item() == pytest.approx(1.758531197524508, rel=1e-13)
    assert terms["attention"].item() == pytest.approx(5.639545331479509, rel=1e-13)
    assert terms["relation"].item() == pytest.approx(55.882779401932396, rel=1e-13)

    order = ["transform.0.bias", "transform.0.weight", "transform.1.bias", "transform.1.weight"]
    order += ["transform.3.bias", "transform.3.weight"]
    names = [f"context_{who}.{n}" for who in ("student", "teacher") for n in order]
    names += [
        f"context_{w}.mask_conv.{p}" for w in ("student", "teacher") for p in ("bias", "weight")
    ]
    for j, name in enumerate(names):
        parameter = loss.get_parameter(name)
        k = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.data = (0.5 * torch.cos(0.7 * k + j)).view(parameter.shape)
    relation = loss(student, teacher, *masks)["relation"]
    assert relation.item() == pytest.approx(54.45954968879185, rel=1e-13)
    loss.weights = Weights(1e-3, 5e-4, 5e-4, 5e-6)
    total = sum(loss(student, teacher, *masks).values())
    assert total.item() == pytest.approx(0.005285450744688178, rel=1e-13)


# Inverted, zero-size and outside boxes come by themselves.
coordinate = st.floats(-8, 72, width=32) | st.sampled_from([math.nan, math.inf, -math.inf])


@settings(max_examples=40, deadline=None)
@given(
    boxes=st.lists(st.lists(st.tuples(*[coordinate] * 4), max_size=5), min_size=1, max_size=2),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    temperature=st.floats(0.2, 2.0),
    seed=st.integers(0, 99),
    terms=st.sampled_from([fused_terms, composed_terms]),
)
def test_equals_the_literal_reference(boxes, size, channels, temperature, seed, terms):
    boxes = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    sizes = [(64, 64)] * len(boxes)
    loss = randomize(FGDLevelLoss(*channels, UNIT, temperature, terms).double(), seed)
    student = random(len(boxes), channels[0], *size, seed=seed).requires_grad_()
    teacher = random(len(boxes), channels[1], *size, seed=seed + 100)
    found = loss(student, teacher, *cell_weights(boxes, size, sizes, torch.float64))
    wanted = reference.terms(
        student, teacher, boxes, sizes, dict(loss.named_parameters()), temperature
    )
    for name in TERMS:
        torch.testing.assert_close(
            found[name], torch.as_tensor(wanted[name], dtype=torch.float64), rtol=1e-9, atol=1e-12
        )
    sum(found.values()).backward()
    assert student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("channels", [(3, 3), (2, 4)], ids=["same", "align"])
def test_gradcheck(channels):
    loss = randomize(FGDLevelLoss(*channels, Weights(1.0, 0.5, 0.3, 0.2)).double())
    masks = cell_weights(
        [torch.tensor([[3.0, 3, 20, 20]])] * 2, (3, 4), [(24, 32)] * 2, torch.float64
    )
    teacher = random(2, channels[1], 3, 4, seed=1)
    names = [n for n, _ in loss.named_parameters()]

    def total(student, *parameters):
        call = torch.func.functional_call
        terms = call(loss, dict(zip(names, parameters, strict=True)), (student, teacher, *masks))
        return tuple(terms.values())

    inputs = random(2, channels[0], 3, 4).requires_grad_(), *loss.parameters()
    assert torch.autograd.gradcheck(total, inputs)


def test_teacher_gets_no_gradient_and_equal_maps_give_zero():
    teacher = random(1, 4, 3, 3).requires_grad_()
    student = teacher.detach().clone().requires_grad_()
    masks = cell_weights([torch.tensor([[0.0, 0, 9, 9]])], (3, 3), [(24, 24)], torch.float64)
    total = sum(FGDLevelLoss(4, 4, UNIT).double()(student, teacher, *masks).values())
    total.backward()
    assert total.item() == 0
    assert teacher.grad is None
    assert student.grad.abs().max() == 0


def test_half_precision_features_of_a_large_level_stay_finite():
    # 67,200 cells: H*W alone overflows float16, as do the sums.
    student = (random(1, 64, 200, 336, dtype=torch.float32) * 4).half().requires_grad_()
    teacher = (random(1, 64, 200, 336, seed=1, dtype=torch.float32) * 4).half()
    masks = cell_weights([torch.tensor([[10.0, 10, 700, 500]])], (200, 336), [(800, 1344)])
    loss = FGDLevelLoss(64, 64, UNIT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(student, teacher, *masks)
    exact = copy.deepcopy(loss).double()(student.double(), teacher.double(), *masks)
    for name in TERMS:
        assert terms[name].dtype == torch.float32
        assert terms[name].item() == pytest.approx(exact[name].item(), rel=1e-4)
    (sum(terms.values()) * 1e-3).backward()
    assert student.grad.isfinite().all()


def test_no_boxes_and_full_boxes():
    student, teacher = random(2, 4, 3, 5).requires_grad_(), random(2, 4, 3, 5, seed=1)
    loss = FGDLevelLoss(4, 4, UNIT).double()
    empty = cell_weights([torch.zeros(0, 4)] * 2, (3, 5), [(24, 40)] * 2, torch.float64)
    terms = loss(student, teacher, *empty)
    assert terms["foreground"].item() == 0 and terms["foreground"].requires_grad
    assert torch.autograd.grad(terms["foreground"], student)[0].abs().max() == 0
    assert terms["background"].item() > 0
    full = cell_weights(
        [torch.tensor([[0.0, 0, 40, 24]])] * 2, (3, 5), [(24, 40)] * 2, torch.float64
    )
    assert loss(student, teacher, *full)["background"].item() == 0


def test_refuses_maps_that_differ_and_an_empty_batch():
    loss = FGDLevelLoss(4, 4, UNIT)
    mask = torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 3\).*\(1, 4, 3, 4\)"):
        loss(torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 4), mask, mask)
    with pytest.raises(ValueError, match="at least one"):
        loss(torch.zeros(0, 4, 3, 3), torch.zeros(0, 4, 3, 3), mask[:0], mask[:0])
    with pytest.raises(ValueError, match="at least 2 channels"):
        GlobalContext(1)


def test_parameters_are_those_of_the_paper():
    loss = FGDLevelLoss(256, 256, UNIT)
    assert loss.align is None
    assert sum(p.numel() for p in loss.parameters()) == 132_866
    assert FGDLevelLoss(64, 256, UNIT).align.weight.shape == (256, 64, 1, 1)
    block = loss.context_student
    features = torch.randn(2, 256, 3, 3)
    torch.testing.assert_close(block(features), features, rtol=0, atol=0)  # identity at first
    assert block.mask_conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.2)
