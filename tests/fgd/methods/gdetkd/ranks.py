"""What the processes of test_processes.py run; new processes import it by name."""

from pathlib import Path

import torch
from detectron2.utils import comm

from fgd.methods.batch import Regions, RegionSizes, RegionView
from fgd.methods.gdetkd import GDetKD
from tests.fgd.methods.batches import make_batch

WIDTHS, GAMMA, STEPS = (3, 4), 0.3, 2
# Regions of each process in each step: unequal, none in one, none in both, and more than the memory
# holds.
COUNTS = [(5, 2), (0, 4), (0, 0), (3, 0), (2, 2)]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def make():
    torch.manual_seed(0)
    weights = {"sgfi": 0.0, "ckd": 2.0, "reg": 0.0}
    return GDetKD([], weights, RegionSizes(3, 7, *WIDTHS), GAMMA, STEPS).double()


def regions_of(rank, step):
    """Two images, the first with one region less than half."""
    count, seed = COUNTS[step][rank], 100 * rank + 10 * step
    corner = 3 * random(count, 2, seed=seed + 2)
    boxes = torch.cat([corner, corner + 20], dim=1)
    first = max(count // 2 - 1, 0)
    student, teacher = (random(count, w, seed=seed + n) for n, w in enumerate(WIDTHS))
    return Regions(
        boxes=[boxes[:first], boxes[first:]],
        labels=torch.zeros(count).long(),
        targets=boxes,
        num_classes=1,
        student=RegionView(None, student, None, None),
        teacher=RegionView(None, teacher, None, None),
    )


def term(method, regions):
    batch = make_batch({}, {}, [torch.zeros(0, 4)] * 2, (32, 32), regions=regions)
    return method(batch)["regions"]["ckd"]


def contrast(folder: str) -> int:
    """Under DDP, step by step: the term, its gradients, and the memory; leaves rank{r}.pth."""
    rank, method = comm.get_rank(), make()

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.method = method

        def forward(self, regions):
            zero = sum(0.0 * p.sum() for p in self.parameters())  # as the Distiller does
            return term(self.method, regions) + zero

    model, found = torch.nn.parallel.DistributedDataParallel(Wrapped()), []
    for step in range(len(COUNTS)):
        regions = regions_of(rank, step)
        embedding = regions.student.embedding.requires_grad_()
        model.zero_grad()
        value = model(regions)
        value.backward()
        (weight,) = (p.grad.clone() for p in method.parameters())
        memory = [x.clone() for x in method.memory.sets()]
        found.append((value.detach(), embedding.grad, weight, memory))
    torch.save(found, Path(folder) / f"rank{rank}.pth")
    return 0
