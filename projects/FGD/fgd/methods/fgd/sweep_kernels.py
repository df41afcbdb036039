"""Triton kernels of the two sweeps; `sweep_triton` launches them and says what they promise.

A program takes one run of cells of one image: for every block of cells it holds the tile of all
channels of both maps in registers, so that sums over channels (attention, context logits) and
over cells (everything else) come from one read. Softmaxes over cells keep a running maximum. A
program writes its partial sums to rows of its own and `merge` adds them in a fixed order: no
atomics, so equal inputs give equal bits on the same GPU.

Where one tile cannot hold all channels, `cell_sums` reads the maps once more, before programs
that take a block of channels each.

Sums are float32, or float64 if a map is: the type of the tensors that the kernels write. Offsets
are int64, since a batch of large maps has more than 2**31 values.
"""

import triton
import triton.language as tl

# Rows, in order, of the tensors (4, N, P) and (8, N, C) that the forward kernels write.
BY_CELL = "student_cells", "teacher_cells", "student_logits", "teacher_logits"
BY_CHANNEL = (
    *("student_channels", "teacher_channels", "student_context", "teacher_context"),
    *("error", "squared", "foreground", "background"),
)


@triton.jit
def _offsets(n, c, p, stride_n, stride_c, stride_p, ALIGN: tl.constexpr):
    """Offsets of a tile [channels, cells] of image ``n``.

    ALIGN divides the strides of images and channels. Rounding down to it changes nothing, but
    shows the compiler that neighbouring cells can be moved together (by itself it sees multiples
    of 16 only, which the second FPN level rarely has).
    """
    row = n * (stride_n // ALIGN * ALIGN) + c * (stride_c // ALIGN * ALIGN)
    return row[:, None] + p[None, :] * stride_p


@triton.jit
def _tile(base, offsets, inside, dtype: tl.constexpr):
    """Values [channels, cells] as ``dtype``; 0 where not ``inside``."""
    return tl.load(base + offsets, mask=inside, other=0.0).to(dtype)


@triton.jit
def _store_rows(row, step, values, mask):
    """Store a tuple of vectors in rows that are ``step`` apart."""
    for i in tl.static_range(len(values)):
        tl.store(row + i * step, values[i], mask=mask)


@triton.jit
def cell_sums(
    student, teacher, weight_student, weight_teacher, by_cell,
    s_n, s_c, s_p, t_n, t_c, t_p, weight_n, C, P,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write ``by_cell`` (4, N, P): sums over channels of |S|, |T|, weight_s * S, weight_t * T."""
    n, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    dtype: tl.constexpr = by_cell.dtype.element_ty
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    real = p < P // ALIGN * ALIGN  # see `_offsets`
    size_s, size_t = tl.zeros([BLOCK_P], dtype), tl.zeros([BLOCK_P], dtype)
    dot_s, dot_t = tl.zeros([BLOCK_P], dtype), tl.zeros([BLOCK_P], dtype)
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = (c < C)[:, None] & real[None, :]
        s = _tile(student, _offsets(n, c, p, s_n, s_c, s_p, ALIGN), inside, dtype)
        t = _tile(teacher, _offsets(n, c, p, t_n, t_c, t_p, ALIGN), inside, dtype)
        w_s = tl.load(weight_student + n * weight_n + c, mask=c < C, other=0.0)
        w_t = tl.load(weight_teacher + n * weight_n + c, mask=c < C, other=0.0)
        size_s += tl.sum(tl.abs(s), axis=0)
        size_t += tl.sum(tl.abs(t), axis=0)
        dot_s += tl.sum(s * w_s[:, None], axis=0)
        dot_t += tl.sum(t * w_t[:, None], axis=0)
    row, rows = by_cell + n * P + p, images.to(tl.int64) * P
    _store_rows(row, rows, (size_s, size_t, dot_s, dot_t), real)


@triton.jit
def _soften(logits, maximum, total, real):
    """One block of an online softmax over cells.

    Returns the block's weights, the new maximum, the factor that earlier sums need for it, and
    the new total of weights. A block has at least one real cell, so the maximum is not -inf.
    """
    logits = tl.where(real, logits, float("-inf"))
    highest = tl.maximum(maximum, tl.max(logits, axis=0))
    weights, shrink = tl.exp(logits - highest), tl.exp(maximum - highest)
    return weights, highest, shrink, total * shrink + tl.sum(weights, axis=0)


@triton.jit
def forward(
    student, teacher, mask_student, mask_teacher, foreground, background, by_cell, sums, softmaxes,
    s_n, s_c, s_p, t_n, t_c, t_p, C, P, run,
    SHARPNESS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Partial sums of one run of cells for one block of channels.

    Args:
        foreground, background: (N, P). by_cell: (4, N, P), `BY_CELL`, written if ``WHOLE`` (one
            block has all channels), else read. sums: (8, N, runs, C), `BY_CHANNEL` of the run,
            softmaxes and means not yet divided. softmaxes: (6, N, runs), maxima, then totals,
            of student logits, teacher logits and teacher response.
        run: cells of a run, a multiple of BLOCK_P. SHARPNESS: 1 / (C * temperature).
    """
    number, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    runs, images = tl.num_programs(0), tl.num_programs(2).to(tl.int64)
    dtype: tl.constexpr = sums.dtype.element_ty
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    if WHOLE:
        w_s = tl.load(mask_student + c, mask=c < C, other=0.0)
        w_t = tl.load(mask_teacher + c, mask=c < C, other=0.0)
    lowest = tl.full([], float("-inf"), dtype)
    high_s, high_t, high_a = lowest, lowest, lowest
    zero = tl.zeros([], dtype)
    count, total_s, total_t, total_a = zero, zero, zero, zero
    zeros = tl.zeros([BLOCK_C], dtype)
    size_s, size_t, context_s, context_t = zeros, zeros, zeros, zeros
    error, squared, inner, outer = zeros, zeros, zeros, zeros

    first = number * run
    for start in range(first, tl.minimum(first + run, P), BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        real = p < P // ALIGN * ALIGN  # see `_offsets`
        inside = (c < C)[:, None] & real[None, :]
        s = _tile(student, _offsets(n, c, p, s_n, s_c, s_p, ALIGN), inside, dtype)
        t = _tile(teacher, _offsets(n, c, p, t_n, t_c, t_p, ALIGN), inside, dtype)
        row, rows = by_cell + n * P + p, images * P
        if WHOLE:
            logits_s = tl.sum(s * w_s[:, None], axis=0)
            logits_t = tl.sum(t * w_t[:, None], axis=0)
            response = tl.sum(tl.abs(t), axis=0)
            found = (tl.sum(tl.abs(s), axis=0), response, logits_s, logits_t)
            _store_rows(row, rows, found, real)
        else:
            response = tl.load(row + rows, mask=real, other=0.0)
            logits_s = tl.load(row + 2 * rows, mask=real, other=0.0)
            logits_t = tl.load(row + 3 * rows, mask=real, other=0.0)

        weights, high_s, shrink, total_s = _soften(logits_s, high_s, total_s, real)
        context_s = context_s * shrink + tl.sum(s * weights[None, :], axis=1)
        weights, high_t, shrink, total_t = _soften(logits_t, high_t, total_t, real)
        context_t = context_t * shrink + tl.sum(t * weights[None, :], axis=1)
        size_s += tl.sum(tl.abs(s), axis=1)
        size_t += tl.sum(tl.abs(t), axis=1)

        # Mean and centred squares of the block, merged as Chan et al. do: no cancellation.
        d = s - t
        size = tl.sum(real.to(dtype), axis=0)
        block_error = tl.sum(d, axis=1)
        mean = block_error / size
        centred = tl.where(inside, d - mean[:, None], 0.0)
        apart = mean - error / tl.maximum(count, 1.0)
        squared += tl.sum(centred * centred, axis=1)
        squared += apart * apart * (count * size / (count + size))
        error += block_error
        count += size

        weights, high_a, shrink, total_a = _soften(response * SHARPNESS, high_a, total_a, real)
        d *= d
        weight = weights * tl.load(foreground + n * P + p, mask=real, other=0.0)
        inner = inner * shrink + tl.sum(d * weight[None, :], axis=1)
        weight = weights * tl.load(background + n * P + p, mask=real, other=0.0)
        outer = outer * shrink + tl.sum(d * weight[None, :], axis=1)

    row, rows = sums + (n * runs + number) * C + c, images * runs * C
    found = (size_s, size_t, context_s, context_t, error, squared, inner, outer)
    _store_rows(row, rows, found, c < C)
    row, rows = softmaxes + n * runs + number, images * runs
    # All blocks of channels have the same.
    _store_rows(row, rows, (high_s, high_t, high_a, total_s, total_t, total_a), block == 0)


@triton.jit
def _shares(softmaxes, offset, real, maximum, total, rows):
    """What each run's sums weigh in the softmax over all runs; 0 where not ``real``."""
    highest = tl.load(softmaxes + maximum * rows + offset, mask=real, other=float("-inf"))
    weights = tl.exp(highest - tl.max(highest, axis=0))
    totals = tl.load(softmaxes + total * rows + offset, mask=real, other=0.0)
    return weights / tl.sum(weights * totals, axis=0)


@triton.jit
def _add_runs(source, target, weights, inside, real):
    """Sum the runs [runs, channels] under their weights."""
    part = tl.load(source, mask=inside, other=0.0) * weights[:, None]
    tl.store(target, tl.sum(part, axis=0), mask=real)


@triton.jit
def merge(
    sums, softmaxes, by_channel, runs, C, P, run, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Partial sums (8, N, runs, C) → ``by_channel`` (8, N, C), the same rows for all P cells."""
    n, images = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    dtype: tl.constexpr = sums.dtype.element_ty
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < C
    inside = (r < runs)[:, None] & real[None, :]
    source, row = sums + (n * runs + r[:, None]) * C + c[None, :], images * runs * C
    target, rows = by_channel + n * C + c, images * C

    ones = tl.full([BLOCK_R], 1.0, dtype)
    _add_runs(source, target, ones, inside, real)
    _add_runs(source + row, target + rows, ones, inside, real)
    offset, step = n * runs + r, images * runs
    shares = _shares(softmaxes, offset, r < runs, 0, 3, step)
    _add_runs(source + 2 * row, target + 2 * rows, shares, inside, real)
    shares = _shares(softmaxes, offset, r < runs, 1, 4, step)
    _add_runs(source + 3 * row, target + 3 * rows, shares, inside, real)
    shares = _shares(softmaxes, offset, r < runs, 2, 5, step) * P
    _add_runs(source + 6 * row, target + 6 * rows, shares, inside, real)
    _add_runs(source + 7 * row, target + 7 * rows, shares, inside, real)

    error = tl.load(source + 4 * row, mask=inside, other=0.0)
    total = tl.sum(error, axis=0)
    tl.store(target + 4 * rows, total, mask=real)
    size = tl.maximum(tl.minimum(P - r * run, run), 1).to(dtype)
    apart = tl.where(inside, error / size[:, None] - (total / P)[None, :], 0.0)
    part = tl.load(source + 5 * row, mask=inside, other=0.0) + apart * apart * size[:, None]
    tl.store(target + 5 * rows, tl.sum(part, axis=0), mask=real)


@triton.jit
def backward(
    student, teacher, mask_student, gradient, by_cell, sums,
    error_cells, error_channels, error_all, constant, sign_cells, sign_channels,
    attention_student, attention_teacher, context_student, context_teacher,
    dot_student, dot_teacher,
    s_n, s_c, s_p, t_n, t_c, t_p, g_n, g_c, g_p, C, P, run,
    WHOLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient of one run of cells for one block of channels.

    Args:
        gradient: of the student's map. by_cell: (4, N, P), whose rows 2 and 3 are the maps times
            the contexts' gradients, read unless ``WHOLE``. sums: (2, N, runs, C), partial sums of
            the gradients of both masks. Then `Slopes`, in its order; run as in `forward`.
    """
    number, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    runs, images = tl.num_programs(0), tl.num_programs(2).to(tl.int64)
    dtype: tl.constexpr = sums.dtype.element_ty
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    w_s = tl.load(mask_student + c, mask=c < C, other=0.0)
    scale = tl.load(error_channels + n * C + c, mask=c < C, other=0.0)
    shift = tl.load(constant + n * C + c, mask=c < C, other=0.0)
    sign = tl.load(sign_channels + n * C + c, mask=c < C, other=0.0)
    pull_s = tl.load(context_student + n * C + c, mask=c < C, other=0.0)
    if WHOLE:
        pull_t = tl.load(context_teacher + n * C + c, mask=c < C, other=0.0)
    everywhere = tl.load(error_all + n)
    mean_s, mean_t = tl.load(dot_student + n), tl.load(dot_teacher + n)
    grad_s, grad_t = tl.zeros([BLOCK_C], dtype), tl.zeros([BLOCK_C], dtype)

    first = number * run
    for start in range(first, tl.minimum(first + run, P), BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        real = p < P // ALIGN * ALIGN  # see `_offsets`
        inside = (c < C)[:, None] & real[None, :]
        s = _tile(student, _offsets(n, c, p, s_n, s_c, s_p, ALIGN), inside, dtype)
        t = _tile(teacher, _offsets(n, c, p, t_n, t_c, t_p, ALIGN), inside, dtype)
        if WHOLE:
            along_s = tl.sum(s * pull_s[:, None], axis=0)
            along_t = tl.sum(t * pull_t[:, None], axis=0)
        else:
            row, rows = by_cell + n * P + p, images * P
            along_s = tl.load(row + 2 * rows, mask=real, other=0.0)
            along_t = tl.load(row + 3 * rows, mask=real, other=0.0)
        soft = tl.load(attention_student + n * P + p, mask=real, other=0.0)
        q_s = soft * (along_s - mean_s)
        q_t = tl.load(attention_teacher + n * P + p, mask=real, other=0.0) * (along_t - mean_t)
        grad_s += tl.sum(s * q_s[None, :], axis=1)
        grad_t += tl.sum(t * q_t[None, :], axis=1)

        k = tl.load(error_cells + n * P + p, mask=real, other=0.0)
        u = tl.load(sign_cells + n * P + p, mask=real, other=0.0)
        grad = (s - t) * (k[None, :] * scale[:, None] + everywhere) + shift[:, None]
        towards = u[None, :] + sign[:, None]
        grad += tl.where(s > 0, towards, tl.where(s < 0, -towards, 0.0))
        grad += pull_s[:, None] * soft[None, :] + w_s[:, None] * q_s[None, :]
        target = gradient + _offsets(n, c, p, g_n, g_c, g_p, ALIGN)
        tl.store(target, grad.to(gradient.dtype.element_ty), mask=inside)

    row, rows = sums + (n * runs + number) * C + c, images * runs * C
    _store_rows(row, rows, (grad_s, grad_t), c < C)
