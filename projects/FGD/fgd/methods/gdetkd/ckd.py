"""CKD, contrastive knowledge distillation: a region's vector in the student is to be nearer to the
teacher's vector of the same region than to its vectors of other ones.

R regions of this process, D the teacher's width. s (R, D): the student's embedding through a
linear map without bias, t (R, D): the teacher's, both as directions, of length 1. With gamma a
temperature,

    L = mean_i -log( e(i, i) / sum_j e(i, j) ),   e(i, j) = exp(s_i . t_j / gamma)

j runs over the regions of this process without those of the same image whose box overlaps box i by
an IoU above 0.5 (i itself stays), over the regions of this step in all other processes, and over
those of all processes in the last steps, which `Memory` holds. Gradients flow into s alone.
"""

from typing import List, Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

OVERLAP = 0.5
_SHORT = 1e-6


def info_nce(
    student: Tensor, teacher: Tensor, ignored: Tensor, others: Sequence[Tensor], gamma: float
) -> Tensor:
    """L above; >= 0, and exactly 0 without a region.

    Of the others' logits nothing is held for the backward pass, which computes them again.

    Args:
        student, teacher: directions s, t (R, D). ignored: (R, R) bool, pairs that are left out,
            none of them (i, i). others: further t, (M, D) each.
    """
    if not len(student):
        return student.sum()
    own = (student @ teacher.T) / gamma
    sums = [own.masked_fill(ignored, -torch.inf).logsumexp(dim=1)]
    for rows in others:
        if len(rows):
            sums.append(checkpoint(_log_sum, student, rows, gamma, **_AGAIN))
    return (torch.stack(sums).logsumexp(dim=0) - own.diagonal()).mean()


_AGAIN = {"use_reentrant": False, "preserve_rng_state": False}


def _log_sum(student: Tensor, rows: Tensor, gamma: float) -> Tensor:
    return ((student @ rows.T) / gamma).logsumexp(dim=1)


def directions(vectors: Tensor) -> Tensor:
    """(R, D) → the same with rows of length 1.

    A row shorter than 1e-6, such as one that a ReLU has set to 0, has no direction: it becomes 0
    and gets no gradient, which would be without bound.
    """
    length = vectors.norm(dim=1, keepdim=True)
    known = length > _SHORT
    return torch.where(known, vectors / torch.where(known, length, 1), 0)


def overlapping(boxes: Sequence[Tensor]) -> Tensor:
    """(R, R) bool: pairs of different boxes of one image with an IoU above 0.5.

    Args:
        boxes: of each image, (R_i, 4) XYXY.
    """
    pairs = [pairwise_iou(Boxes(x), Boxes(x)) > OVERLAP for x in boxes]
    found = torch.block_diag(*pairs)
    return found.fill_diagonal_(False)


class Projections(nn.Module):
    """Linear maps without bias from the student's embedding, one for each anchor of a cell."""

    def __init__(self, student: int, teacher: int, anchors: int = 1):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(student, teacher, bias=False) for _ in range(anchors))

    def forward(self, vectors: Tensor, anchors: Tensor) -> Tensor:
        """(R, D_s) → (R, D); ``anchors``: (R,), which map is a row's."""
        choice = anchors[:, None] == torch.arange(len(self.linear), device=anchors.device)
        spread = choice[:, :, None] * vectors[:, None]
        return F.linear(spread.flatten(1), torch.cat([x.weight for x in self.linear], dim=1))


class Memory(nn.Module):
    """The teacher's vectors of the last steps, the newest first, each (M, D) with an M of its own.

    Buffers, so that they are saved with the distillation and a resumed run goes on with the same.
    """

    def __init__(self, steps: int, width: int):
        super().__init__()
        self.names = tuple(f"step_{k}" for k in range(steps))
        for name in self.names:
            self.register_buffer(name, torch.zeros(0, width))

    def sets(self) -> List[Tensor]:
        return [getattr(self, name) for name in self.names]

    def push(self, rows: Tensor) -> None:
        """Add those of a step; the oldest step is forgotten."""
        for name, value in zip(self.names, [rows.detach(), *self.sets()]):
            setattr(self, name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for name in self.names:
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def of_all_processes(rows: Tensor) -> List[Tensor]:
    """Tensors (M, D) of each process, by rank; M may differ, and be 0. All call it together."""
    if comm.get_world_size() == 1:
        return [rows]
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(comm.get_world_size())]
    torch.distributed.all_gather(counts, count)
    counts = torch.cat(counts).tolist()
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    found = [torch.empty_like(padded) for _ in counts]
    if max(counts):
        torch.distributed.all_gather(found, padded.contiguous())
    return [x[:count] for x, count in zip(found, counts, strict=True)]
