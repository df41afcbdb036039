import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fgd.methods.gdetkd.ckd import (
    Memory,
    Projections,
    directions,
    info_nce,
    of_all_processes,
    overlapping,
)

from . import reference

E = math.exp(1)


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def boxes_of(count, seed=0):
    """Boxes that often overlap."""
    corner = 3 * random(count, 2, seed=seed)
    return torch.cat([corner, corner + 20 + 3 * random(count, 2, seed=seed + 1).abs()], dim=1)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    others=st.lists(st.integers(0, 4), max_size=3),
    gamma=st.floats(0.07, 2),
    seed=st.integers(0, 999),
)
def test_it_equals_the_literal_reference(counts, others, gamma, seed):
    total = sum(counts)
    student, teacher = (random(total, 3, seed=seed + n) for n in (0, 1))
    boxes = [boxes_of(count, seed + n) for n, count in enumerate(counts)]
    more = [random(count, 3, seed=seed + 5 + n) for n, count in enumerate(others)]
    given = [directions(x) for x in (student, teacher)]
    rows = [directions(x) for x in more]
    found = info_nce(*given, overlapping(boxes), rows, gamma)
    wanted = reference.ckd(
        student.tolist(),
        teacher.tolist(),
        [x.tolist() for x in boxes],
        [row for x in more for row in x.tolist()],
        gamma,
    )
    assert found.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_by_hand():
    same = torch.eye(2, dtype=torch.float64)  # two regions that the student sees as the teacher
    apart, none = torch.zeros(2, 2, dtype=torch.bool), []
    crossed = ~torch.eye(2, dtype=torch.bool)
    assert info_nce(same, same, apart, none, 1.0).item() == pytest.approx(math.log(1 + 1 / E))
    assert info_nce(same, same, crossed, none, 1.0).item() == 0  # its own positive is kept
    # Both vectors are each region's own and the other's: one of two, then one of four.
    assert info_nce(same[:1], same[:1], apart[:1, :1], none, 1.0).item() == 0
    flat = same[:1].repeat(2, 1)
    assert info_nce(flat, flat, apart, none, 0.07).item() == pytest.approx(math.log(2))
    assert info_nce(flat, flat, apart, [flat], 0.07).item() == pytest.approx(math.log(4))
    assert info_nce(flat, flat, crossed, [flat], 0.07).item() == pytest.approx(math.log(3))
    assert info_nce(flat, -flat, crossed, [flat], 0.5).item() == pytest.approx(
        math.log(math.exp(-2) + 2 * math.exp(2)) + 2
    )


def test_which_pairs_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5.1], [0, 0, 10, 10]])
    found = overlapping([boxes, boxes[:0], boxes[:2]])
    wanted = torch.zeros(6, 6, dtype=torch.bool)
    for a, b in ((0, 2), (0, 3), (2, 3), (1, 2)):  # IoU 0.51, 1, 0.51, 5 / 5.1; 0.5 is not above
        wanted[a, b] = wanted[b, a] = True
    assert torch.equal(found, wanted)
    assert overlapping([boxes[:0], boxes[:0]]).shape == (0, 0)


def test_scale_and_order_do_not_matter():
    student, teacher = random(5, 4), random(5, 4, seed=1)
    boxes = boxes_of(5)
    others = [directions(random(3, 4, seed=2)), directions(random(2, 4, seed=3))]

    def value(student, teacher, boxes, others):
        sides = directions(student), directions(teacher)
        return info_nce(*sides, overlapping([boxes]), others, 0.1).item()

    first = value(student, teacher, boxes, others)
    order = [3, 1, 4, 0, 2]
    assert value(student[order], teacher[order], boxes[order], others[::-1]) == pytest.approx(first)
    assert value(7 * student, 0.2 * teacher, boxes, others) == pytest.approx(first)
    assert value(teacher, teacher, boxes, others) < first
    assert value(student, teacher, boxes, others[:1]) < first  # fewer negatives


def test_gradcheck():
    student, teacher = random(4, 3).requires_grad_(), directions(random(4, 3, seed=1))
    ignored = overlapping([boxes_of(4)])
    assert ignored.any() and not ignored.all()
    others = [directions(random(3, 3, seed=2)), torch.zeros(0, 3)]

    def value(student):
        return info_nce(directions(student), teacher, ignored, others, 0.3)

    assert torch.autograd.gradcheck(value, (student,))


def test_of_other_vectors_nothing_is_held():
    student, teacher = random(6, 4).requires_grad_(), directions(random(6, 4, seed=1))
    others = [directions(random(500, 4, seed=n)) for n in (2, 3)]
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        info_nce(directions(student), teacher, overlapping([boxes_of(6)]), others, 0.3)
    assert max(x.numel() for x in held if x.data_ptr() != others[0].data_ptr()) <= 2000
    assert sum(x.numel() for x in held if x.numel() >= 3000) == 0  # R M = 3000 logits


@pytest.mark.parametrize("others", [[], [random(3, 4)]])
def test_without_a_region_it_is_zero_and_connected(others):
    student = torch.zeros(0, 4, requires_grad=True)
    value = info_nce(student, torch.zeros(0, 4), overlapping([torch.zeros(0, 4)]), others, 0.07)
    assert value.item() == 0
    assert torch.autograd.grad(value, student)[0].shape == (0, 4)


def test_a_vector_of_zeros_has_no_direction_and_no_gradient():
    vectors = torch.tensor([[3.0, 4], [0, 0], [1e-9, 0]], requires_grad=True)
    found = directions(vectors)
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0], [0, 0]]
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), vectors)
    torch.testing.assert_close(gradient[0], torch.tensor([0.8 * 0.16, -0.6 * 0.16]))
    assert gradient[1:].abs().sum() == 0


def test_each_anchor_has_a_map_of_its_own():
    maps = Projections(4, 5, anchors=3).double()
    vectors, anchors = random(7, 4).requires_grad_(), torch.tensor([2, 0, 0, 2, 2, 0, 0])
    found = maps(vectors, anchors)
    for row, anchor, own in zip(vectors, anchors, found, strict=True):
        torch.testing.assert_close(own, maps.linear[anchor].weight @ row)
    found.sum().backward()
    assert [x.weight.grad.abs().sum() > 0 for x in maps.linear] == [True, False, True]
    single = Projections(4, 5)
    assert [name for name, _ in single.named_parameters()] == ["linear.0.weight"]
    assert single(random(0, 4).float(), torch.zeros(0).long()).shape == (0, 5)


def rows(step):
    """A step's vectors: as many as its number modulo 4, all of its number."""
    return torch.full((step % 4, 2), float(step))


def contents(memory):
    return [x.tolist() for x in memory.sets()]


def test_the_memory_holds_the_last_steps_newest_first():
    memory = Memory(3, 2)
    assert contents(memory) == [[], [], []]
    memory.push(rows(1))
    assert contents(memory) == [[[1, 1]], [], []]  # partly filled
    for step in (2, 3):
        memory.push(rows(step))
    assert contents(memory) == [rows(3).tolist(), rows(2).tolist(), rows(1).tolist()]
    for step in (4, 5):  # around, with a step without regions
        memory.push(rows(step))
    assert contents(memory) == [rows(5).tolist(), [], rows(3).tolist()]


def test_the_memory_holds_values_and_no_graph():
    memory = Memory(2, 2)
    memory.push(torch.ones(3, 2, requires_grad=True) * 2)
    assert not memory.step_0.requires_grad
    assert not any(p.requires_grad for p in memory.parameters())
    nothing = Memory(0, 2)
    nothing.push(torch.ones(3, 2))
    assert nothing.sets() == [] and nothing.state_dict() == {}


def test_a_saved_memory_is_taken_up_whatever_the_present_one_holds():
    saved, other = Memory(3, 2), Memory(3, 2)
    for step in (1, 2, 3, 4, 5):
        saved.push(rows(step))
    other.push(rows(3))
    state = {f"m.{k}": v.clone() for k, v in saved.state_dict().items()}
    holder = nn.ModuleDict({"m": other})
    holder.load_state_dict(state)
    assert contents(other) == contents(saved)
    for memory in (saved, other):
        memory.push(rows(6))
    assert contents(other) == contents(saved)
    assert torch.equal(state["m.step_0"], rows(5))  # the file's own is not written to
    del state["m.step_2"]
    with pytest.raises(RuntimeError, match="Missing key.*step_2"):
        holder.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key.*step_2"):
        Memory(2, 2).load_state_dict(saved.state_dict())


def test_one_process_is_alone():
    vectors = random(3, 2)
    (own,) = of_all_processes(vectors)
    assert own is vectors
