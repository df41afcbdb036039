import pytest
import torch

from fgd.methods.drkd.pixel import GraphReasoning, PixelRelation, distance
from tests.fgd.methods.drkd import reference


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def randomize(module, seed=0):
    """Parameters away from their initial values, where the units are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double()


SHAPES = [(2, 3, 3, 4), (1, 2, 1, 5), (1, 4, 1, 1), (3, 2, 4, 1)]


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("norm", ["BN", "GN"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_literal_reference(shape, norm, form):
    n, channels, height, width = shape
    wider = channels + 1
    module = randomize(PixelRelation(channels, wider, 3, form, norm), seed=height)
    student = random(*shape, seed=1).requires_grad_()
    teacher = random(n, wider, height, width, seed=2)
    parameters = dict(module.named_parameters())
    groups = [1, 1] if norm == "GN" else [0, 0]
    wanted = reference.pixel_relation(student, teacher, parameters, form, groups)
    found = module(student, teacher)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)
    inputs = [student, *parameters.values()]
    wanted, found = (torch.autograd.grad(x, inputs, allow_unused=True) for x in (wanted, found))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("norm", ["BN", "GN"])
@pytest.mark.parametrize("form", ["paper", "code"])
def test_a_new_unit_changes_nothing_and_learns(form, norm):
    unit = GraphReasoning(4, 3, form, norm).double()
    features = random(2, 4, 3, 5)
    out = unit(features)
    assert torch.equal(out, features)
    out.square().sum().backward()
    assert unit.norm.weight.grad.abs().min() > 0
    assert dict(unit.named_buffers()) == {}  # no running statistics


def test_group_normalisation_has_32_groups():
    unit = GraphReasoning(256, 2, "paper", "GN")
    assert unit.norm.num_groups == 32 and unit.norm.eps == 1e-4


def test_the_paper_form_does_not_grow_with_the_map():
    features = random(1, 4, 3, 5)
    larger = features.repeat(1, 1, 2, 2)  # every cell four times
    for form, same in (("paper", True), ("code", False)):
        unit = randomize(GraphReasoning(4, 3, form))
        found = [unit(x)[:, :, :3, :5] for x in (features, larger)]
        assert torch.allclose(*found, rtol=1e-4) is True if same else not torch.allclose(*found)


def test_distance_by_hand():
    student, teacher = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 5.0])
    assert distance(student, teacher, "paper") == 25
    assert distance(student, teacher, "code") == 5


def test_equal_maps_give_zero_with_a_zero_gradient():
    features = random(1, 2, 3, 3)
    for form in ("paper", "code"):
        student = features.clone().requires_grad_()
        module = PixelRelation(2, 2, 2, form).double()
        torch.nn.init.dirac_(module.adapt.weight)
        torch.nn.init.zeros_(module.adapt.bias)
        value = module(student, features)
        value.backward()
        assert value == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize("form", ["paper", "code"])
def test_gradcheck(form):
    module = randomize(PixelRelation(2, 3, 2, form))
    teacher = random(2, 3, 2, 3, seed=1)
    names = [name for name, _ in module.named_parameters()]

    def value(student, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (student, teacher))

    assert torch.autograd.gradcheck(
        value, (random(2, 2, 2, 3).requires_grad_(), *module.parameters())
    )


@pytest.mark.parametrize("nodes, limit", [(16, 4.7), (64, 7.1)])
def test_what_is_held_for_the_backward_pass(nodes, limit):
    # 64 and 256 nodes at 256 channels, reduced by four.
    module = PixelRelation(64, 64, nodes, "paper")
    student, teacher = torch.randn(1, 64, 64, 64, requires_grad=True), torch.randn(1, 64, 64, 64)
    given = {x.data_ptr() for x in (student, teacher, *module.parameters())}
    held = {}

    def pack(x):
        if x.data_ptr() not in given:
            held[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(student, teacher)
    maps = sum(x.numel() for x in held.values()) / student.numel()
    assert limit - 1 < maps < limit
