"""The two sweeps as plain float64 formulas over whole maps: what every implementation must equal.

Written from the definitions in the docstrings of `sweep`, with autograd's own softmax and
without tiles or running sums.
"""

import torch

from fgd.methods.fgd.sweep import Slopes, Sweep


def random(*shape, seed=0, scale=1.0):
    """Normal float64 values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator) * scale


def inputs(n, channels, height, width, seed=0, scale=1.0):
    """Arguments of a forward sweep but for the temperature, and `Slopes`, all float64."""
    cells = height * width
    maps = [random(n, channels, height, width, seed=seed + i, scale=scale) for i in (0, 1)]
    ramp = torch.linspace(0.5, 2, cells, dtype=torch.float64).view(height, width)
    for one in maps:
        one *= ramp  # so that the maxima of softmaxes come late
        one[1::2] = one[1::2].flip(2, 3)  # or early
    maps[0][0, 0, 0, 0] = 0  # sign(0) is 0
    maps[0][:, -1] += 100 * scale  # far from zero: squares about the mean must not cancel
    masks = [random(channels, seed=seed + i) / channels**0.5 for i in (2, 3)]
    foreground, background = (random(n, cells, seed=seed + i).abs() for i in (4, 5))
    foreground[:, ::2], background[:, 1::2] = 0, 0
    sizes = [(n, cells), (n, channels), (n,), (n, channels), (n, cells), (n, channels)]
    sizes += [(n, cells)] * 2 + [(n, channels)] * 2 + [(n,)] * 2
    slopes = [random(*size, seed=seed + 6 + i) for i, size in enumerate(sizes)]
    for i in (6, 7):  # attention
        slopes[i] = slopes[i].softmax(dim=1)
    return (*maps, *masks, foreground, background), Slopes(*slopes)


def forward(student, teacher, mask_student, mask_teacher, foreground, background, temperature):
    """`sweep.forward_sweep` of float64 maps."""
    s, t = student.flatten(2), teacher.flatten(2)
    d = s - t
    logits_s, logits_t = (
        torch.einsum("c,ncp->np", m, x) for m, x in ((mask_student, s), (mask_teacher, t))
    )
    attention = s.shape[2] * (t.abs().mean(1) / temperature).softmax(1)
    return Sweep(
        student_cells=s.abs().sum(1),
        teacher_cells=t.abs().sum(1),
        student_channels=s.abs().sum(2),
        teacher_channels=t.abs().sum(2),
        student_logits=logits_s,
        teacher_logits=logits_t,
        student_context=torch.einsum("np,ncp->nc", logits_s.softmax(1), s),
        teacher_context=torch.einsum("np,ncp->nc", logits_t.softmax(1), t),
        error=d.sum(2),
        squared=(d - d.mean(2, keepdim=True)).square().sum(2),
        foreground=torch.einsum("np,np,ncp->nc", foreground, attention, d.square()),
        background=torch.einsum("np,np,ncp->nc", background, attention, d.square()),
    )


def backward(student, teacher, mask_student, slopes):
    """`sweep.backward_sweep` of float64 maps; needs no mask weights of the teacher."""
    s, t = student.flatten(2), teacher.flatten(2)
    column = lambda x: x[:, :, None]  # noqa: E731  per channel
    row = lambda x: x[:, None, :]  # noqa: E731  per cell
    q_s, q_t = (
        attention * (torch.einsum("nc,ncp->np", context, x) - dot[:, None])
        for x, attention, context, dot in (
            (s, slopes.student_attention, slopes.student_context, slopes.student_dot),
            (t, slopes.teacher_attention, slopes.teacher_context, slopes.teacher_dot),
        )
    )
    everywhere = slopes.error_all[:, None, None]
    weight = row(slopes.error_cells) * column(slopes.error_channels) + everywhere
    gradient = (s - t) * weight + column(slopes.constant)
    gradient += s.sign() * (row(slopes.sign_cells) + column(slopes.sign_channels))
    gradient += column(slopes.student_context) * row(slopes.student_attention)
    gradient += mask_student[:, None] * row(q_s)
    by_masks = (torch.einsum("np,ncp->c", q, x) for q, x in ((q_s, s), (q_t, t)))
    return gradient.view(student.shape), *by_masks
