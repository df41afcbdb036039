"""One read of a level's two maps gives all that the FGD terms need; one more gives the gradient.

Pure functions that walk over tiles: their temporaries are a small fraction of a map, and all that
lies between the two sweeps is per cell or per channel. `fused` makes the terms of them.

N images, C channels, P = H*W cells. Maps are (N, C, H, W) of any floating dtype and layout; student
S and teacher T may differ in both. All else has the dtype of `small_dtype`.
"""

from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor

from ..parts import small_dtype
from .tiles import Scratch, by_cell, by_channel, tiles


class Sweep(NamedTuple):
    """What `forward_sweep` finds; D = S - T.

    The logits are those of the two GlobalContext modules, the contexts their means over cells
    under the softmax of the logits. A is the teacher's spatial attention (`attention`).
    """

    student_cells: Tensor  # (N, P) sum over channels of |S|
    teacher_cells: Tensor  # (N, P)
    student_channels: Tensor  # (N, C) sum over cells of |S|
    teacher_channels: Tensor  # (N, C)
    student_logits: Tensor  # (N, P) mask_student · S
    teacher_logits: Tensor  # (N, P)
    student_context: Tensor  # (N, C)
    teacher_context: Tensor  # (N, C)
    error: Tensor  # (N, C) sum over cells of D
    squared: Tensor  # (N, C) sum over cells of (D - its mean over cells)^2
    foreground: Tensor  # (N, C) sum over cells of foreground * A * D^2
    background: Tensor  # (N, C) sum over cells of background * A * D^2


class Slopes(NamedTuple):
    """What `backward_sweep` needs beside the maps; its docstring has the formula."""

    error_cells: Tensor  # (N, P)
    error_channels: Tensor  # (N, C)
    error_all: Tensor  # (N,)
    constant: Tensor  # (N, C)
    sign_cells: Tensor  # (N, P)
    sign_channels: Tensor  # (N, C)
    student_attention: Tensor  # (N, P) softmax of the logits
    teacher_attention: Tensor  # (N, P)
    student_context: Tensor  # (N, C) gradient of the loss by the context
    teacher_context: Tensor  # (N, C)
    student_dot: Tensor  # (N,) that gradient · the context
    teacher_dot: Tensor  # (N,)


def forward_sweep(
    student: Tensor,
    teacher: Tensor,
    mask_student: Tensor,
    mask_teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    temperature: float,
) -> Sweep:
    """Read both maps once.

    Args:
        student, teacher: (N, C, H, W), no size 0.
        mask_student, mask_teacher: (C,) weights of the GlobalContext modules' ``mask_conv``; its
            bias would shift a softmax, so it is not needed.
        foreground, background: (N, P) cell weights. temperature: of A, > 0.
    """
    student, teacher = student.flatten(2), teacher.flatten(2)
    scratch = Scratch(small_dtype(student, teacher))
    parts = []
    for images, runs in tiles(student):
        found = []
        for cells in runs:
            s = scratch.cast(student[images, :, cells], "student")
            t = scratch.cast(teacher[images, :, cells], "teacher")
            masks = foreground[images, cells], background[images, cells]
            found.append(_read(s, t, (mask_student, mask_teacher), masks, temperature, scratch))
        parts.append(_merge(found))
    return Sweep(*(torch.cat(values) for values in zip(*parts)))


class _Run(NamedTuple):
    """What `_read` finds in one tile of B images and T cells; maxima and sums are its own."""

    cells: Tensor  # (4, B, T) the first two and the two logits of `Sweep`
    totals: Tensor  # (3, B, C) student_channels, teacher_channels, error
    squared: Tensor  # (B, C) around the tile's own mean
    peaks: Tensor  # (3, B) largest student logit, teacher logit, exponent of A
    masses: Tensor  # (3, B) sum over cells of exp(those - peak)
    weighted: Tensor  # (4, B, C) contexts and feature errors under exp(those - peak)


def _read(s: Tensor, t: Tensor, masks, cell_weights, temperature: float, scratch: Scratch) -> _Run:
    all_cells, all_channels = s.new_ones(len(s), s.shape[2]), s.new_ones(s.shape[1])
    first, second = scratch.like(s, "first"), scratch.like(s, "second")
    cells, totals = [], []
    for tile in (s, t):
        magnitude = torch.abs(tile, out=first)
        cells.append(by_cell(magnitude, all_channels))
        totals.append(by_channel(magnitude, all_cells))
    cells += [by_cell(s, masks[0]), by_cell(t, masks[1])]
    exponents = torch.stack([*cells[2:], cells[1] / (s.shape[1] * temperature)])
    peaks = exponents.amax(dim=2)
    shares = exponents.sub_(peaks[:, :, None]).exp_()
    error = torch.sub(s, t, out=first)
    totals.append(by_channel(error, all_cells))
    squares = torch.mul(error, error, out=second)
    weighted = [
        by_channel(s, shares[0]),
        by_channel(t, shares[1]),
        *(by_channel(squares, shares[2] * weights) for weights in cell_weights),
    ]
    centred = error.sub_((totals[2] / s.shape[2])[:, :, None])
    squared = torch.linalg.vector_norm(centred, dim=2).square_()
    masses = shares.sum(dim=2)
    return _Run(
        torch.stack(cells), torch.stack(totals), squared, peaks, masses, torch.stack(weighted)
    )


def _merge(found: List[_Run]) -> Sweep:
    """The sums over all cells from those of the runs of cells of the same images."""
    cells = torch.cat([run.cells for run in found], dim=2)
    totals, squared, peaks, masses, weighted = (torch.stack(x) for x in list(zip(*found))[1:])
    # No tensor is made of a list of numbers here: a GPU would be waited for.
    lengths = totals.new_full((len(found), 1, 1), found[0].cells.shape[2])
    lengths[-1] = found[-1].cells.shape[2]
    errors = totals[:, 2]
    spread = (errors / lengths - errors.sum(dim=0) / cells.shape[2]).square() * lengths
    rescale = (peaks - peaks.amax(dim=0)).exp()  # (runs, 3, B)
    rescale = rescale / (masses * rescale).sum(dim=0)
    rescale = torch.cat([rescale, rescale[:, 2:]], dim=1)[..., None]
    weighted = (weighted * rescale).sum(dim=0)
    return Sweep(
        *cells[:2],
        *totals[:, :2].sum(dim=0),
        *cells[2:],
        *weighted[:2],
        errors.sum(dim=0),
        (squared + spread).sum(dim=0),
        *(weighted[2:] * cells.shape[2]),
    )


def backward_sweep(
    student: Tensor, teacher: Tensor, mask_student: Tensor, mask_teacher: Tensor, slopes: Slopes
) -> Tuple[Tensor, Tensor, Tensor]:
    """Read both maps once more and write the gradient of the student's.

    With q = student_attention * (student_context · S - student_dot), the gradient by the logits,

        gradient = D * (error_cells * error_channels + error_all) + constant
                   + sign(S) * (sign_cells + sign_channels)
                   + student_context * student_attention + mask_student * q

    Returns:
        The gradients of ``student`` (its dtype; channels_last if it is), ``mask_student`` and
        ``mask_teacher`` (C,); of a mask, the sum over images and cells of q times the map.
    """
    channels_last = student.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if channels_last else torch.contiguous_format
    gradient = torch.empty_like(student, memory_format=order)
    written = gradient.flatten(2)  # in both orders a view
    student, teacher = student.flatten(2), teacher.flatten(2)
    scratch = Scratch(small_dtype(student, teacher))
    of_student, of_teacher = torch.zeros_like(mask_student), torch.zeros_like(mask_teacher)
    for images, runs in tiles(student):
        for cells in runs:
            s = scratch.cast(student[images, :, cells], "student")
            t = scratch.cast(teacher[images, :, cells], "teacher")
            here = _slopes_of(slopes, images, cells)
            q = _by_logits(s, here.student_attention, here.student_context, here.student_dot)
            of_student += by_channel(s, q).sum(dim=0)
            _write(written[images, :, cells], s, t, mask_student, q, here, scratch)
            q = _by_logits(t, here.teacher_attention, here.teacher_context, here.teacher_dot)
            of_teacher += by_channel(t, q).sum(dim=0)
    return gradient, of_student, of_teacher


_PER_CELL = ("error_cells", "sign_cells", "student_attention", "teacher_attention")


def _slopes_of(slopes: Slopes, images: slice, cells: slice) -> Slopes:
    return Slopes(
        *(
            value[images, cells] if name in _PER_CELL else value[images]
            for name, value in slopes._asdict().items()
        )
    )


def _by_logits(tile: Tensor, attention: Tensor, by_context: Tensor, dot: Tensor) -> Tensor:
    """(B, T) gradient by the logits of a softmax whose mean of the tile has gradient by_context."""
    return attention * (by_cell(tile, by_context) - dot[:, None])


def _write(out, s: Tensor, t: Tensor, mask: Tensor, q: Tensor, here: Slopes, scratch: Scratch):
    """The formula of `backward_sweep` for one tile; vectors spread over channels and cells."""

    def channels(x: Tensor) -> Tensor:
        return x[..., :, None]

    def cells(x: Tensor) -> Tensor:
        return x[:, None, :]

    total, factor = scratch.like(s, "first"), scratch.like(s, "second")
    # addcmul with a vector as its first operand would be several times slower than these two.
    torch.mul(channels(here.error_channels), cells(here.error_cells), out=factor)
    factor.add_(here.error_all[:, None, None])
    torch.sub(s, t, out=total).mul_(factor)
    total.addcmul_(channels(here.student_context), cells(here.student_attention))
    total.addcmul_(channels(mask), cells(q))
    total.add_(channels(here.constant))
    torch.add(channels(here.sign_channels), cells(here.sign_cells), out=factor)
    sign = torch.sign(s, out=scratch.like(s, "third"))
    if out.dtype == total.dtype:
        torch.addcmul(total, sign, factor, out=out)
    else:
        out.copy_(total.addcmul_(sign, factor))
