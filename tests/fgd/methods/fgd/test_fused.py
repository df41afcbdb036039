import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from fgd.methods.fgd import tiles
from fgd.methods.fgd.fused import fused_terms
from fgd.methods.fgd.masks import cell_weights
from fgd.methods.fgd.terms import FGDLevelLoss, Weights, composed_terms

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
coordinate = st.floats(-8, 72, width=32)
weight = st.sampled_from([0.0, 1e-3, 0.5, 3.0])


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def make(channels, weights, temperature, terms, dtype, seed=0):
    """A level's loss with parameters away from their initial values."""
    loss = FGDLevelLoss(*channels, weights, temperature, terms).to(dtype)
    for i, parameter in enumerate(loss.parameters()):
        parameter.data = random(*parameter.shape, seed=seed + i, dtype=dtype) * 0.3
    return loss


def values_and_gradients(loss, student, teacher, masks):
    """The four terms by name; gradients of their sum by student and parameters."""
    student = student.clone().requires_grad_()
    terms = loss(student, teacher, *masks)
    leaves = {"student": student, **dict(loss.named_parameters())}
    gradients = torch.autograd.grad(sum(terms.values()), leaves.values())
    return {**terms, **dict(zip(leaves, gradients))}


def assert_equal(loss_of, inputs, dtype):
    """`loss_of(terms)` is a level's loss; compares the fused one with the definition."""
    fused, wanted = (
        values_and_gradients(loss_of(terms), *inputs) for terms in (fused_terms, composed_terms)
    )
    assert fused.keys() == wanted.keys()
    # A LayerNorm over one hidden channel enlarges rounding by up to 1 / sqrt(1e-5).
    rounding = 400 * torch.finfo(dtype).eps * max(x.norm() for x in wanted.values())
    for name, value in wanted.items():
        allowed = TOLERANCE[dtype] * value.norm() + rounding
        if name.endswith("mask_conv.bias"):  # shifts a softmax
            assert fused[name] == 0 and value.abs() <= rounding
        else:
            assert (fused[name] - value).norm() <= allowed, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=60, deadline=None)
@given(
    boxes=st.lists(st.lists(st.tuples(*[coordinate] * 4), max_size=4), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(st.integers(1, 6), st.integers(2, 6)),
    weights=st.tuples(weight, weight, weight, weight),
    temperature=st.floats(0.2, 2.0),
    tile=st.sampled_from([1, 20, 64, 10**6]),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(dtype, boxes, size, channels, weights, temperature, tile, seed):
    boxes = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    student = random(len(boxes), channels[0], *size, seed=seed, dtype=dtype)
    teacher = random(len(boxes), channels[1], *size, seed=seed + 100, dtype=dtype)
    masks = cell_weights(boxes, size, [(64, 64)] * len(boxes), dtype)

    def loss_of(terms):
        return make(channels, Weights(*weights), temperature, terms, dtype, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_CPU_TILE", tile)
        assert_equal(loss_of, (student, teacher, masks), dtype)


def level(channels=(5, 5), size=(4, 6), dtype=torch.float64, n=2):
    student = random(n, channels[0], *size, dtype=dtype)
    teacher = random(n, channels[1], *size, seed=9, dtype=dtype)
    boxes = [torch.tensor([[3.0, 3, 30, 20], [10, 0, 47, 15]])] + [torch.zeros(0, 4)] * (n - 1)
    return student, teacher, cell_weights(boxes, size, [(32, 48)] * n, dtype)


def loss_of(terms, weights=(1.0, 0.7, 0.4, 0.2), channels=(5, 5), dtype=torch.float64):
    return make(channels, Weights(*weights), 0.6, terms, dtype)


@pytest.mark.parametrize("terms", [fused_terms, composed_terms])
def test_each_term_can_be_scaled_by_itself(terms):
    """Gradients of the terms add up under any factors, so a loss can be weighted after the fact."""
    student, teacher, masks = level()
    student.requires_grad_()
    values = list(loss_of(terms)(student, teacher, *masks).values())
    apart = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in values]
    factors = [2.0, 0.0, -3.0, 100.0]
    together = torch.autograd.grad(sum(f * x for f, x in zip(factors, values)), student)[0]
    torch.testing.assert_close(together, sum(f * x for f, x in zip(factors, apart)))
    assert all(x.abs().max() > 0 for x in apart)


def test_one_map_used_twice_sums_its_gradients():
    student, teacher, masks = level()
    student.requires_grad_()
    loss = loss_of(fused_terms)
    one = sum(loss(student * 2, teacher, *masks).values())
    expected = torch.autograd.grad(one, student)[0]
    terms = [sum(loss(student * 2, teacher, *masks).values()), student.square().sum()]
    again = sum(loss(student * 2, teacher, *masks).values())
    sum([*terms, again]).backward()
    torch.testing.assert_close(student.grad, 2 * expected + 2 * student.detach())


def test_gradient_scaler_scales_and_unscales():
    """Half-precision maps under a scaled loss: the gradients are the unscaled ones."""
    student, teacher, masks = level(dtype=torch.float32)
    loss = loss_of(fused_terms, dtype=torch.float32)
    plain = values_and_gradients(loss, student.half(), teacher.half(), masks)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    leaf = student.half().float().requires_grad_()
    optimizer = torch.optim.SGD([leaf, *loss.parameters()], lr=0.0)
    scaler.scale(sum(loss(leaf.half(), teacher.half(), *masks).values())).backward()
    assert leaf.grad.norm() > 100 * plain["student"].norm()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(leaf.grad, plain["student"].float(), rtol=2e-3, atol=1e-6)
    for name, parameter in loss.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)


def test_every_parameter_gets_a_gradient():
    """DDP waits for each one, the biases that cannot matter included."""
    loss = loss_of(fused_terms, weights=(0.0, 0.0, 0.0, 0.0))
    student, teacher, masks = level()
    sum(loss(student.requires_grad_(), teacher, *masks).values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in loss.parameters())
    assert student.grad.abs().max() == 0


def test_maps_of_different_precision_and_order():
    student, teacher, masks = level(dtype=torch.float32)
    teacher = teacher.bfloat16()
    mixed = loss_of(fused_terms, dtype=torch.float32)
    last = student.to(memory_format=torch.channels_last)
    wanted = values_and_gradients(mixed, student, teacher.float(), masks)
    for name, value in values_and_gradients(mixed, last, teacher, masks).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def held_elements(terms, inputs):
    """Elements that autograd keeps between forward and backward beside maps and parameters."""
    student, teacher, masks = inputs
    student = student.clone().requires_grad_()
    loss = loss_of(terms, channels=(student.shape[1],) * 2, dtype=student.dtype)
    known = {x.data_ptr() for x in (student, teacher, *loss.parameters())}
    held = {}

    def note(tensor):
        if tensor.data_ptr() not in known:
            held[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        sum(loss(student, teacher, *masks).values())
    return sum(held.values())


def test_only_vectors_are_kept_for_the_backward():
    inputs = level((128, 128), (20, 30), torch.float32)
    map_elements = inputs[0].numel()
    assert held_elements(fused_terms, inputs) < 0.1 * map_elements
    assert held_elements(composed_terms, inputs) > 2 * map_elements  # the count can count


def test_second_derivatives_are_refused():
    student, teacher, masks = level()
    student.requires_grad_()
    total = sum(loss_of(fused_terms)(student, teacher, *masks).values())
    gradient = torch.autograd.grad(total, student, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
