"""The two sweeps of `sweep` as Triton kernels: a GPU reads both maps once per sweep.

Untested on a GPU: this was written without one. The numbers are checked in Triton's interpreter
and the kernels compile for sm_80 and sm_90; that shows neither speed nor every fault that a real
GPU would show. So nothing uses them unless asked to.

The kernels and how they divide the work are in `sweep_kernels`. Equal inputs give equal bits
on GPUs of one model. Nothing here makes the host wait for the GPU. Importing this needs Triton.
"""

import math
from typing import NamedTuple, Tuple

import torch
import triton
from torch import Tensor

from ...errors import UserError
from ..parts import small_dtype
from . import sweep_kernels as kernels
from .sweep import Slopes, Sweep

# Values of each map that a program holds at a time, 16 per thread. `forward` and `backward` would
# take up to 230 registers per thread; with 128, two programs share a multiprocessor, so that one
# loads while the other computes. That spills up to 90 bytes per thread in float32 and 270 in half
# precision, more only where the number of cells is no multiple of 4: on the small levels.
_TILE, _MOST_CHANNELS, _WARPS, _REGISTERS = 4096, 256, 8, 128
_PROGRAMS_PER_PROCESSOR = 2
_MOST_RUNS, _MERGED_CHANNELS = 256, 16  # of one image and of one tile of `merge`


def usable(student: Tensor) -> bool:
    """Whether the kernels run here: an NVIDIA GPU of sm_80 or newer, or Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return True
    if not student.is_cuda or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(student.device) >= (8, 0)


def forward_sweep(
    student: Tensor,
    teacher: Tensor,
    mask_student: Tensor,
    mask_teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    temperature: float,
) -> Sweep:
    """As `sweep.forward_sweep`: the same arguments, the same results up to rounding.

    Raises:
        UserError: the maps are not on a GPU that is `usable`.
    """
    if not usable(student):
        raise UserError(
            f"the Triton kernels of FGD need an NVIDIA GPU of sm_80 or newer, this map is on "
            f"{student.device}: set MODEL.DISTILLER.FGD.IMPLEMENTATION to 'torch'"
        )
    dtype = small_dtype(student, teacher)
    student, teacher = _flat(student), _flat(teacher)
    n, channels, cells = student.shape
    plan = _plan(n, channels, cells, _processors(student.device))
    masks, weights = (
        [x.detach().to(dtype).contiguous() for x in pair]
        for pair in ((mask_student, mask_teacher), (foreground, background))
    )
    by_cell = student.new_empty(4, n, cells, dtype=dtype)
    by_channel = student.new_empty(8, n, channels, dtype=dtype)
    sums = student.new_empty(8, n, plan.runs, channels, dtype=dtype)
    softmaxes = student.new_empty(6, n, plan.runs, dtype=dtype)
    sharpness = 1 / (channels * temperature)
    with torch.cuda.device_of(student):
        if plan.blocks > 1:
            _cell_sums(student, teacher, *masks, by_cell, plan)
        kernels.forward[plan.runs, plan.blocks, n](
            student, teacher, *masks, *weights, by_cell, sums, softmaxes,
            *student.stride(), *teacher.stride(), channels, cells, plan.run,
            SHARPNESS=sharpness, WHOLE=plan.blocks == 1, ALIGN=_alignment(student, teacher),
            **plan.options,
        )  # fmt: skip
        kernels.merge[triton.cdiv(channels, _MERGED_CHANNELS), n](
            sums, softmaxes, by_channel, plan.runs, channels, cells, plan.run,
            BLOCK_R=triton.next_power_of_2(plan.runs), BLOCK_C=_MERGED_CHANNELS, num_warps=_WARPS,
        )  # fmt: skip
    return Sweep(
        **dict(zip(kernels.BY_CELL, by_cell.unbind())),
        **dict(zip(kernels.BY_CHANNEL, by_channel.unbind())),
    )


def backward_sweep(
    student: Tensor, teacher: Tensor, mask_student: Tensor, mask_teacher: Tensor, slopes: Slopes
) -> Tuple[Tensor, Tensor, Tensor]:
    """As `sweep.backward_sweep`: the same arguments, the same results up to rounding."""
    shape, dtype = student.shape, small_dtype(student, teacher)
    student, teacher = _flat(student), _flat(teacher)
    n, channels, cells = student.shape
    plan = _plan(n, channels, cells, _processors(student.device))
    mask_student = mask_student.detach().to(dtype).contiguous()
    slopes = Slopes(*(x.detach().to(dtype).contiguous() for x in slopes))
    gradient = torch.empty_like(student)
    sums = student.new_empty(2, n, plan.runs, channels, dtype=dtype)
    by_cell = sums  # a pointer that kernels which see all channels do not follow
    with torch.cuda.device_of(student):
        if plan.blocks > 1:
            by_cell = student.new_empty(4, n, cells, dtype=dtype)
            contexts = slopes.student_context, slopes.teacher_context
            _cell_sums(student, teacher, *contexts, by_cell, plan)
        kernels.backward[plan.runs, plan.blocks, n](
            student, teacher, mask_student, gradient, by_cell, sums, *slopes,
            *student.stride(), *teacher.stride(), *gradient.stride(), channels, cells, plan.run,
            WHOLE=plan.blocks == 1, ALIGN=_alignment(student, teacher, gradient), **plan.options,
        )  # fmt: skip
    return gradient.view(shape), *sums.sum(dim=(1, 2)).unbind()


class _Plan(NamedTuple):
    """How one map is divided. It follows from shapes and the model of the GPU."""

    channels: int  # of a tile, a power of two
    blocks: int  # of channels
    cells: int  # of a tile, a power of two
    run: int  # cells of a run, a multiple of ``cells``
    runs: int  # per image; none is empty

    @property
    def options(self) -> dict:
        """Arguments of all kernels that read the maps."""
        tile = {"BLOCK_C": self.channels, "BLOCK_P": self.cells}
        return {**tile, "num_warps": _WARPS, "maxnreg": _REGISTERS}


def _plan(images: int, channels: int, cells: int, processors: int) -> _Plan:
    """Runs of equal length; as many programs as run at once on the GPU, or one per image."""
    width = min(max(triton.next_power_of_2(channels), 16), _MOST_CHANNELS)
    blocks = triton.cdiv(channels, width)
    wanted = max(_PROGRAMS_PER_PROCESSOR * processors // (images * blocks), 1)
    tiles = triton.cdiv(cells, _TILE // width)
    length = triton.cdiv(tiles, min(wanted, _MOST_RUNS))
    return _Plan(
        width, blocks, _TILE // width, length * (_TILE // width), triton.cdiv(tiles, length)
    )


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for Triton's interpreter, which runs on the CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _flat(features: Tensor) -> Tensor:
    """(N, C, H, W) → (N, C, P): a view where equal steps lead from cell to cell, else a copy."""
    return features.detach().flatten(2)


def _alignment(*maps: Tensor) -> int:
    """A power of two, at most 8, that divides the cells and the strides of images and channels."""
    return math.gcd(8, maps[0].shape[2], *(stride for x in maps for stride in x.stride()[:2]))


def _cell_sums(
    student: Tensor,
    teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    by_cell: Tensor,
    plan: _Plan,
) -> None:
    """Fill ``by_cell`` (4, N, P). Weights are (C,), or (N, C) and then differ between images."""
    n, channels, cells = student.shape
    stride_n = channels if weight_student.dim() == 2 else 0
    kernels.cell_sums[triton.cdiv(cells, plan.cells), n](
        student, teacher, weight_student, weight_teacher, by_cell, *student.stride(),
        *teacher.stride(), stride_n, channels, cells,
        ALIGN=_alignment(student, teacher), **plan.options,
    )  # fmt: skip
