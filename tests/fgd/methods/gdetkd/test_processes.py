"""Two processes contrast their regions with each other's: as one process does over both halves."""

import pytest
import torch

from fgd.processes.launch import launch

from . import ranks, reference
from .ranks import COUNTS, GAMMA, STEPS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrast")
    assert launch(ranks.contrast, (str(folder),), device="cpu", processes=2) == 0
    return [torch.load(folder / f"rank{r}.pth", weights_only=True) for r in range(2)]


def literal(weight, step, embeddings=None):
    """The mean over processes of the weighted term, by loops; ``embeddings``: of both students."""
    sides = [ranks.regions_of(rank, step) for rank in range(2)]
    total = []
    for rank, own in enumerate(sides):
        student = own.student.embedding if embeddings is None else embeddings[rank]
        teacher = [x.teacher.embedding.tolist() for x in sides]
        before = [
            row
            for earlier in range(max(0, step - STEPS), step)
            for r in range(2)
            for row in ranks.regions_of(r, earlier).teacher.embedding.tolist()
        ]
        boxes = [x.tolist() for x in own.boxes]
        others = teacher[1 - rank] + before
        projected = (student @ weight.T).tolist()
        total.append(2.0 * reference.ckd(projected, teacher[rank], boxes, others, GAMMA))
    return total


@pytest.mark.parametrize("step", range(len(COUNTS)))
def test_values_are_those_of_the_literal_computation(step, found):
    (weight,) = ranks.make().parameters()
    wanted = literal(weight.detach(), step)
    for rank in range(2):
        assert found[rank][step][0].item() == pytest.approx(wanted[rank], rel=1e-12, abs=1e-14)
        assert (wanted[rank] > 0) == (COUNTS[step][rank] > 0)


@pytest.mark.parametrize("step", range(len(COUNTS)))
def test_gradients_are_those_of_the_mean_over_processes(step, found):
    """Against differences of the literal computation; an embedding has its own process's."""
    (weight,) = ranks.make().parameters()
    weight, small = weight.detach(), 1e-6

    def slope(moved):
        return (sum(moved(small)) - sum(moved(-small))) / (2 * small)

    for index in [(0, 0), (2, 1), (3, 2)]:

        def by_weight(shift, index=index):
            other = weight.clone()
            other[index] += shift
            return literal(other, step)

        for rank in range(2):
            own = found[rank][step][2][index].item()
            assert own == pytest.approx(slope(by_weight) / 2, rel=1e-6, abs=1e-9)
    for rank, count in enumerate(COUNTS[step]):
        for row in range(count):

            def by_embedding(shift, rank=rank, row=row):
                sides = [ranks.regions_of(r, step).student.embedding.clone() for r in range(2)]
                sides[rank][row, 1] += shift
                return literal(weight, step, sides)

            own = found[rank][step][1][row, 1].item()
            assert own == pytest.approx(slope(by_embedding), rel=1e-6, abs=1e-9)


def test_negatives_of_the_other_process_count(found):
    (weight,) = ranks.make().parameters()
    regions = ranks.regions_of(0, 0)
    alone = ranks.term(ranks.make(), regions)
    assert found[0][0][0] > alone + 0.1


def test_both_hold_the_same_memory_of_both(found):
    for step in range(len(COUNTS)):
        own, other = (found[rank][step][3] for rank in range(2))
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
        counts = [sum(COUNTS[k]) if k >= 0 else 0 for k in range(step, step - STEPS, -1)]
        assert [len(x) for x in own] == counts
    teacher = torch.cat([ranks.regions_of(r, 4).teacher.embedding for r in range(2)])
    torch.testing.assert_close(own[0], teacher / teacher.norm(dim=1, keepdim=True))
