import math

import pytest
import torch

from fgd.methods.drkd.instance import (
    InstanceTerms,
    random_filter,
    region_features,
    relation_matrix,
)
from tests.fgd.methods.drkd import reference
from tests.fgd.methods.drkd.test_pixel import random, randomize

COMBINATIONS = [(a, b) for a in ("paper", "code") for b in ("trained", "random", "none")]


def draw_boxes(count, seed, size=(48, 64)):
    """In, across the edge of and outside an image; some inverted, some without a size."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    edges = torch.rand(count, 4, generator=generator) * 1.4 - 0.2
    boxes = edges * torch.tensor([width, height, width, height])
    boxes[1::4, 2:] = boxes[1::4, :2]  # no size
    proper = torch.cat([torch.minimum(*boxes.split(2, 1)), torch.maximum(*boxes.split(2, 1))], 1)
    boxes[::2] = proper[::2]
    return boxes


@pytest.mark.parametrize("size", [(6, 8), (1, 1), (1, 7), (5, 1)], ids=str)
@pytest.mark.parametrize("scale", [1 / 8, 1 / 4, 8 / 61])
def test_region_features_equal_the_literal_reference(size, scale):
    maps = random(2, 2, *size)
    boxes = [draw_boxes(6, seed) for seed in range(2)]
    found = region_features(maps, boxes, scale)
    wanted = [
        reference.region(image, box, scale)
        for image, own in zip(maps, boxes)
        for box in own.double().tolist()
    ]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-12)


def test_a_region_by_hand():
    # The value of a cell is its column; a box over columns 2..8 of a row, three bins of two cells.
    maps = torch.arange(12.0).repeat(1, 1, 12, 1)
    (found,) = region_features(maps, [torch.tensor([[8.0, 8, 32, 32]])], 0.25)
    # Bins begin at columns 2, 4, 6; samples 0.5 and 1.5 behind; without the half-pixel shift the
    # sample at 2.5 lies between cells 2 and 3.
    torch.testing.assert_close(found[0], torch.tensor([3.0, 5, 7]).repeat(3, 1))


def test_every_image_has_regions_of_its_own_map():
    maps = random(2, 3, 6, 8)
    boxes = [draw_boxes(2, 0), draw_boxes(3, 1)]
    together = region_features(maps, boxes, 1 / 8)
    alone = [region_features(maps[i : i + 1], boxes[i : i + 1], 1 / 8) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))
    maps[0] += 1
    assert torch.equal(region_features(maps, boxes, 1 / 8)[2:], together[2:])


def test_relation_matrix_by_hand():
    theta = torch.tensor([[1.0, 0], [0, 2]], dtype=torch.float64)
    phi = torch.tensor([[math.log(2), 0], [0, math.log(3)]], dtype=torch.float64)
    # Logits [[ln 2, 0], [0, 2 ln 3]].
    wanted = torch.tensor([[2 / 3, 1 / 3], [0.1, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(relation_matrix(theta, phi), wanted)
    mask = torch.tensor([[0.0, 0], [0, math.log(3)]], dtype=torch.float64)
    # w = [[1/2, 1/2], [1/4, 3/4]]: logits [[ln 2 / 2, 0], [0, 1.5 ln 3]].
    root = 2**0.5, 3**1.5
    rows = [[root[0], 1], [1, root[1]]]
    wanted = torch.tensor([[x / sum(row) for x in row] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(relation_matrix(theta, phi, mask), wanted)
    assert relation_matrix(theta[:0], phi[:0], mask[:0, :0]).shape == (0, 0)
    assert relation_matrix(theta[:1], phi[:1], mask[:1, :1]).tolist() == [[1.0]]


def filters(counts, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [random_filter(n, 9 * channels, generator, torch.float64) for n in counts]


@pytest.mark.parametrize("form, filtered", COMBINATIONS)
@pytest.mark.parametrize("counts", [[2, 3], [0, 1], [1], [0, 0]], ids=str)
def test_equals_the_literal_reference(counts, form, filtered):
    channels = 1, 2
    module = randomize(InstanceTerms(*channels, form, filtered, 0, 2), seed=len(counts))
    with torch.no_grad():  # relations away from one-hot rows
        for side in (module.student, module.teacher):
            side.theta.weight.mul_(0.3)
    total = sum(counts)
    student = random(total, channels[0], 3, 3, seed=1).requires_grad_()
    teacher = random(total, channels[1], 3, 3, seed=2)
    given = [
        filters(counts, c, seed) if filtered == "random" else [] for seed, c in enumerate(channels)
    ]
    found = module(student, teacher, counts, given)
    parameters = dict(module.named_parameters())
    lists = [[list(image) for image in side.split(counts)] for side in (student, teacher)]
    wanted = reference.instance_terms(
        *lists, parameters, form, filtered, list(zip(*given)) if filtered == "random" else None
    )
    inputs = [student, *parameters.values()]
    for name, value in zip(("instance_relation", "instance_feature"), wanted):
        assert found[name].item() == pytest.approx(
            float(torch.as_tensor(value).detach()), rel=1e-11
        )
        if not total:
            assert found[name] == 0
            continue
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        grads = [torch.autograd.grad(x, inputs, **options) for x in (found[name], value)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_order_of_boxes_does_not_matter():
    module = randomize(InstanceTerms(2, 2, "paper", "trained", 0, 3))
    student, teacher = random(4, 2, 3, 3), random(4, 2, 3, 3, seed=1)
    order = torch.tensor([2, 0, 3, 1])
    found = module(student, teacher, [4]), module(student[order], teacher[order], [4])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])
    assert found[0]["instance_relation"] > 1e-3


def test_images_are_averaged_in_the_paper_form_and_summed_in_the_other():
    student, teacher = random(5, 2, 3, 3), random(5, 2, 3, 3, seed=1)
    for form, share in (("paper", 0.5), ("code", 1.0)):
        module = randomize(InstanceTerms(2, 2, form, "none"))
        whole = module(student, teacher, [2, 3])
        parts = [module(student[:2], teacher[:2], [2]), module(student[2:], teacher[2:], [3])]
        for name, value in whole.items():
            torch.testing.assert_close(value, share * (parts[0][name] + parts[1][name]))


def test_one_box_teaches_no_relation():
    module = randomize(InstanceTerms(2, 2, "code", "trained"))
    module(random(1, 2, 3, 3), random(1, 2, 3, 3, seed=1), [1])["instance_relation"].backward()
    grads = {k: v.grad for k, v in module.student.named_parameters()}
    for name, grad in grads.items():
        trained = name.startswith(("g.", "W."))
        assert (grad.abs().max() > 0) == trained, name


def test_a_new_paper_form_of_equal_sides_starts_at_zero():
    module = InstanceTerms(2, 2, "paper", "trained").double()
    module.teacher.load_state_dict(module.student.state_dict())
    regions = random(3, 2, 3, 3).requires_grad_()
    value = module(regions, regions.detach(), [3])["instance_relation"]
    value.backward()
    assert value == 0 and regions.grad.abs().max() == 0


@pytest.mark.parametrize("form, filtered", COMBINATIONS)
def test_gradcheck(form, filtered):
    counts = [2, 0, 3]
    module = randomize(InstanceTerms(1, 2, form, filtered, 2, 2))
    teacher = random(5, 2, 3, 3, seed=1)
    given = [filters(counts, c) for c in (1, 2)]
    names = [name for name, _ in module.named_parameters()]

    def values(student, *parameters):
        own = dict(zip(names, parameters, strict=True))
        args = student, teacher, counts, given
        return tuple(torch.func.functional_call(module, own, args).values())

    inputs = random(5, 1, 3, 3).requires_grad_(), *module.parameters()
    assert torch.autograd.gradcheck(values, inputs)


def test_regions_gradcheck():
    boxes = [draw_boxes(2, 3), draw_boxes(0, 0)]
    cut = lambda maps: region_features(maps, boxes, 1 / 16)  # noqa: E731
    assert torch.autograd.gradcheck(cut, random(2, 1, 3, 4).requires_grad_())


def test_a_random_filter_is_a_new_linear_layer():
    weight, bias = random_filter(50, 400, torch.Generator().manual_seed(0), torch.float64)
    assert weight.shape == (50, 400) and bias.shape == (50,)
    drawn = torch.cat([weight.flatten(), bias])
    assert 0.99 / 20 < drawn.abs().max() <= 1 / 20 and drawn.mean().abs() < 1e-3
    assert drawn.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert random_filter(0, 9, torch.Generator(), torch.float32)[0].shape == (0, 9)


def test_widths():
    module = InstanceTerms(4, 6, "code", "trained", 0, 5)
    assert module.student.theta.weight.shape == (18, 36)
    assert module.teacher.W.weight.shape == (54, 27)
    assert module.teacher.rows.weight.shape == (5, 54)
    assert InstanceTerms(4, 6, "paper", "none", 7).teacher.phi.weight.shape == (7, 54)
