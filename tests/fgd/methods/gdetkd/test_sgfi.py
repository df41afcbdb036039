import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.errors import UserError
from fgd.methods.gdetkd import sgfi
from fgd.methods.gdetkd.sgfi import SGFI, level_shares, on_levels

from . import reference

STRIDES = [8, 16, 32]


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def pyramid(channels=2, seed=0, images=2, size=(5, 6)):
    """Maps of three levels, each half the size of the one before."""
    sizes = [tuple(-(-x // 2**k) for x in size) for k in range(3)]
    return [random(images, channels, *x, seed=seed + k) for k, x in enumerate(sizes)]


def make(student=2, teacher=3, cells=7, seed=0):
    """With keys of a size that levels get unequal shares."""
    torch.manual_seed(seed)
    module = SGFI(student, teacher, cells).double()
    with torch.no_grad():
        module.embed[2].weight.mul_(3)
        module.log_tau.fill_(0.3)
    return module


coordinate = st.floats(-12, 60, width=32)
side = st.floats(1, 48, width=32)


@settings(max_examples=12, deadline=None)
@given(
    drawn=st.lists(st.tuples(coordinate, coordinate, side, side), max_size=4),
    seed=st.integers(0, 99),
)
def test_it_equals_the_literal_reference(drawn, seed):
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in drawn]).reshape(-1, 4)
    boxes = [boxes[:1], boxes[1:]]
    maps, module = pyramid(seed=seed), make(seed=seed)
    teacher = random(len(drawn), 3, 7, 7, seed=seed + 9)
    found = module(maps, STRIDES, boxes, teacher)
    wanted = reference.sgfi(
        [x.numpy() for x in maps],
        STRIDES,
        [x.double().tolist() for x in boxes],
        teacher.numpy(),
        {k: v.detach().numpy() for k, v in module.state_dict().items()},
    )
    assert found.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


BOXES = [torch.tensor([[4.0, 4, 30, 33]]), torch.tensor([[-9.0, 0, 20, 70], [16, 8, 24, 16]])]


def test_every_level_is_pooled_by_its_own_scale_whatever_the_size_of_the_box():
    """Maps that hold the x coordinate of their cells' centres: a bin's mean is its own centre."""
    maps = []
    for stride in STRIDES:
        x = (torch.arange(256 // stride, dtype=torch.float64) + 0.5) * stride
        maps.append(x.expand(1, 1, 256 // stride, -1))
    box = torch.tensor([[0.0, 32, 32, 172, 88]], dtype=torch.float64)
    found = on_levels(maps, STRIDES, box, 7)
    wanted = torch.arange(42.0, 172, 20, dtype=torch.float64).expand(7, 7)
    assert found.shape == (3, 1, 1, 7, 7)
    for level in found[:, 0, 0]:
        torch.testing.assert_close(level, wanted)


def test_shares_by_hand():
    """Products with the teacher's key are tau log 3 and 0: three quarters and one."""
    student = torch.tensor([[[1.0, 0]], [[0.0, 5]]], dtype=torch.float64)
    teacher = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    found = level_shares(student, teacher, torch.tensor(2.0))
    torch.testing.assert_close(found, torch.tensor([[0.75], [0.25]], dtype=torch.float64))


def test_shares_are_over_levels_so_regions_do_not_matter_to_each_other():
    student, teacher, tau = random(3, 5, 4), random(5, 4, seed=1), torch.tensor(0.7)
    found = level_shares(student, teacher, tau)
    torch.testing.assert_close(found.sum(0), torch.ones(5).double())
    assert torch.equal(found[:, :2], level_shares(student[:, :2], teacher[:2], tau))


def test_a_single_level_is_plain_imitation():
    module, teacher = make(), random(3, 3, 7, 7)
    maps = pyramid()[:1]
    rows = torch.cat([torch.tensor([[0.0], [1], [1]]), torch.cat(BOXES)], dim=1).double()
    own = module.adapt(on_levels(maps, STRIDES[:1], rows, 7)[0])
    wanted = (own - teacher).square().mean()
    torch.testing.assert_close(module(maps, STRIDES[:1], BOXES, teacher), wanted)


def test_levels_that_show_what_the_teacher_sees_cost_nothing():
    module = make(student=3)
    with torch.no_grad():
        module.adapt.weight.copy_(torch.eye(3)[:, :, None, None])
        module.adapt.bias.zero_()
    values = torch.tensor([1.0, -2, 0.5], dtype=torch.float64)[:, None, None]
    maps = [values.expand(2, 3, *x.shape[-2:]) for x in pyramid(size=(20, 20))]
    teacher = values.expand(2, 3, 7, 7)
    boxes = [torch.tensor([[20.0, 20, 60, 50]]), torch.tensor([[30.0, 16, 80, 90]])]
    assert module(maps, STRIDES, boxes, teacher).item() == pytest.approx(0, abs=1e-25)
    assert module(maps, STRIDES, boxes, teacher + 2).item() == pytest.approx(4)


def gradients(module, maps, boxes, teacher):
    maps = [x.clone().requires_grad_() for x in maps]
    value = module(maps, STRIDES, boxes, teacher)
    return value, torch.autograd.grad(value, [*maps, *module.parameters()])


def test_blocks_change_nothing(monkeypatch):
    module, teacher = make(), random(3, 3, 7, 7)
    whole = gradients(module, pyramid(), BOXES, teacher)
    monkeypatch.setattr(sgfi, "BLOCK", 2)
    parts = gradients(module, pyramid(), BOXES, teacher)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    assert all(x.abs().sum() > 0 for x in parts[1])


def test_from_forward_to_backward_the_maps_alone_are_held():
    """Not L R C S^2 numbers."""
    module, maps = make(), [x.requires_grad_() for x in pyramid()]
    boxes = [torch.tensor([[4.0, 4, 30, 33]]).repeat(100, 1), BOXES[1]]
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        module(maps, STRIDES, boxes, random(102, 3, 7, 7))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    regions = 8 * 102 * (3 * 7 * 7 + 5)  # the teacher's features and the boxes
    assert sum(storages.values()) <= 8 * sum(x.numel() for x in maps) + regions
    assert 3 * 102 * 2 * 49 * 8 > 2 * sum(storages.values()) - regions


def test_gradcheck():
    module, teacher = make(student=1, teacher=1), random(2, 1, 7, 7)
    maps = [x.requires_grad_() for x in pyramid(channels=1, images=1)[:2]]
    box = [torch.tensor([[3.0, 3, 30, 25], [9, 1, 17, 40]])]

    def value(*inputs):  # the parameters are moved where they are
        return module(inputs[:2], STRIDES[:2], box, teacher)

    assert torch.autograd.gradcheck(value, (*maps, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("counts", [(0, 2), (0, 0)], ids=["one", "all"])
def test_images_without_regions(counts):
    boxes = [own[:count] for own, count in zip(BOXES, counts, strict=True)]
    value, found = gradients(make(), pyramid(), boxes, random(sum(counts), 3, 7, 7))
    assert (value.item() == 0) == (sum(counts) == 0) and value.isfinite()
    for gradient in found[:3]:  # of the maps
        assert gradient[0].abs().sum() == 0
        assert (gradient[1].abs().sum() == 0) == (sum(counts) == 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_odd_sizes(size):
    value, found = gradients(make(), pyramid(images=1, size=size), BOXES[:1], random(1, 3, 7, 7))
    assert value > 0 and all(x.isfinite().all() for x in found)


def test_the_similarity_can_be_scaled_but_not_turned_round():
    module, taught = make(), random(3, 3, 7, 7)
    for value in (-8.0, 8.0):
        module.log_tau.data.fill_(value)
        assert module.log_tau.exp() > 0
        assert module(pyramid(), STRIDES, BOXES, taught).isfinite()


def test_larger_and_smaller_regions():
    module = make(cells=9)
    assert module(pyramid(), STRIDES, BOXES, random(3, 3, 9, 9)) > 0
    with pytest.raises(UserError, match="pools regions to 5x5 cells, .* need 7x7; take a teacher"):
        SGFI(2, 3, 5)
