"""Tests of `sweep_triton` in Triton's interpreter or on a GPU, run by test_sweep_triton.py.

A process of its own, because TRITON_INTERPRET must be set before Triton is imported; without it
the same tests run on a GPU. Maps are tiny: the interpreter takes a tenth of a second for what a
GPU does in microseconds.
"""

import importlib.util
import os

import pytest
import torch
from triton.runtime import interpreter

from fgd.methods.fgd import sweep, sweep_kernels, sweep_triton
from fgd.methods.fgd.fused import fused_terms
from fgd.methods.fgd.terms import GlobalContext, composed_terms

from . import plain_sweep

# What rounding may do to sums of some hundred values, and to a gradient in the map's own dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
ROUNDING = {torch.float64: 0, torch.float32: 0, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor, *scope):
    """Triton 3.6 converts arrays of one element by int(), which numpy 2.4 refuses (triton #9171).

    Its `range` over kernel arguments needs that. Can go when Triton no longer does.
    """
    patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = _patch_tensor


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Runs of several tiles on any GPU."""
    monkeypatch.setattr(sweep_triton, "_processors", lambda device: 1)


def inputs(*shape, scale=1.0):
    arguments, slopes = plain_sweep.inputs(*shape, scale=scale)
    return tuple(x.to(DEVICE) for x in arguments), sweep.Slopes(*(x.to(DEVICE) for x in slopes))


def assert_near(actual, wanted, tolerance, what):
    assert actual.shape == wanted.shape, what
    size = wanted.abs()
    allowed = tolerance * (size + size.median()) + 1e-300
    worst = ((actual.double() - wanted).abs() / allowed).max()
    assert worst <= 1, f"{what}: {worst:.3g} times the tolerance"


def check(arguments, slopes, temperature=0.7):
    """Compare both sweeps with the plain formulas in float64 on the same, rounded inputs."""
    student, teacher, *small = arguments
    dtype = sweep.small_dtype(student, teacher)
    arguments = student, teacher, *(x.to(dtype) for x in small)
    slopes = sweep.Slopes(*(x.to(dtype) for x in slopes))
    exact = [x.double() for x in arguments]

    actual = sweep_triton.forward_sweep(*arguments, temperature)
    for name, wanted in plain_sweep.forward(*exact, temperature)._asdict().items():
        assert getattr(actual, name).dtype == dtype
        assert_near(getattr(actual, name), wanted, TOLERANCE[dtype], name)

    actual = sweep_triton.backward_sweep(*arguments[:4], slopes)
    wanted = plain_sweep.backward(*exact[:3], sweep.Slopes(*(x.double() for x in slopes)))
    assert actual[0].dtype == student.dtype and actual[1].dtype == actual[2].dtype == dtype
    tolerances = (TOLERANCE[dtype] + ROUNDING[student.dtype], TOLERANCE[dtype], TOLERANCE[dtype])
    names = "gradient of student", "of mask_student", "of mask_teacher"
    for values in zip(actual, wanted, tolerances, names):
        assert_near(*values)
    return actual[0]


def in_dtypes(arguments, student, teacher):
    return arguments[0].to(student), arguments[1].to(teacher), *arguments[2:]


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 1, 1), (3, 3, 7, 10), (1, 48, 13, 17), (3, 48, 9, 11), (1, 256, 7, 10), (2, 300, 3, 7)],
    ids=str,
)
def test_equals_the_plain_formulas(shape):
    arguments, slopes = inputs(*shape)
    check(arguments, slopes)


@pytest.mark.parametrize("student", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(student, teacher):
    arguments, slopes = inputs(1, 40, 9, 15)
    check(in_dtypes(arguments, student, teacher), slopes)


@pytest.mark.parametrize("programs", [1, 3, 7, 1000])
def test_any_division_into_programs(programs, monkeypatch):
    """221 cells in tiles of 64: one run of 4 tiles, two of 2, four of 1."""
    monkeypatch.setattr(sweep_triton, "_PROGRAMS_PER_PROCESSOR", programs)
    plan = sweep_triton._plan(1, 48, 221, processors=1)
    assert plan == (64, 1, 64, *{1: (256, 1), 3: (128, 2)}.get(programs, (64, 4)))
    check(*inputs(1, 48, 13, 17))


def layouts(x):
    n, channels, height, width = x.shape
    yield x.to(memory_format=torch.channels_last)
    wide = x.new_full((n + 1, channels + 2, height, width), torch.nan)
    wide[1:, 1:-1] = x
    yield wide[1:, 1:-1]  # cells still follow each other
    wide = x.new_full((n, channels, height, width + 3), torch.nan)
    wide[..., 2:-1] = x
    yield wide[..., 2:-1]  # they do not
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    wide = x.new_full((n, 8 * channels, height, width), torch.nan)
    wide = wide.to(memory_format=torch.channels_last)
    wide[:, ::8] = x
    yield wide[:, ::8]  # the steps of its gradient are other multiples


@pytest.mark.parametrize("which", range(5))
def test_layouts(which):
    (student, teacher, *small), slopes = inputs(2, 20, 4, 12)
    strided = [list(layouts(x))[which] for x in (student, teacher)]
    assert not strided[0].is_contiguous()
    check((strided[0], teacher, *small), slopes)
    gradient = check((strided[0], strided[1], *small), slopes)
    if which == 0:
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_offsets_beyond_32_bits():
    """Three channels 2**30 values apart; of these 4 GiB only the pages in use get memory."""
    (student, teacher, *small), slopes = inputs(1, 3, 1, 8)
    wide = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    wide = wide.as_strided(student.shape, (0, 2**30 + 8, 8, 1))
    wide.copy_(student)
    check((wide, teacher.float(), *small), slopes)


def test_vectors_may_be_strided_and_tracked():
    arguments, slopes = inputs(2, 20, 5, 13)
    doubled = [torch.stack([x, x], dim=-1)[..., 0].requires_grad_() for x in arguments[2:]]
    slopes = sweep.Slopes(*(torch.stack([x, x], dim=-1)[..., 0] for x in slopes))
    exact = [x.detach() for x in arguments]
    actual = sweep_triton.forward_sweep(*arguments[:2], *doubled, 0.5)
    assert_near(actual.foreground, plain_sweep.forward(*exact, 0.5).foreground, 1e-12, "foreground")
    actual = sweep_triton.backward_sweep(*arguments[:2], *doubled[:2], slopes)
    wanted = plain_sweep.backward(*exact[:3], slopes)
    assert_near(actual[0], wanted[0], 1e-12, "gradient")


def test_zero_masks_give_exact_zeros():
    arguments, slopes = inputs(2, 20, 5, 13)
    masks = [torch.zeros_like(x) for x in arguments[2:]]
    found = sweep_triton.forward_sweep(*arguments[:2], *masks, 0.5)
    assert found.foreground.abs().max() == 0 and found.background.abs().max() == 0
    assert_near(found.student_context, arguments[0].mean((2, 3)), 1e-12, "uniform attention")
    equal = sweep_triton.forward_sweep(arguments[0], arguments[0], *arguments[2:], 0.5)
    for values in (equal.error, equal.squared, equal.foreground, equal.background):
        assert values.abs().max() == 0
    nothing = sweep.Slopes(*(torch.zeros_like(x) for x in slopes))
    for gradient in sweep_triton.backward_sweep(*arguments[:4], nothing):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e6), (torch.float16, 400.0)])
def test_saturated_softmaxes_stay_finite(dtype, scale):
    arguments, _ = inputs(2, 48, 9, 15, scale=scale)
    student, teacher, *small = in_dtypes(arguments, dtype, dtype)
    small[2:] = [x + 0.1 for x in small[2:]]  # wherever the one cell is, it counts
    found = sweep_triton.forward_sweep(student, teacher, *(x.float() for x in small), 0.5)
    exact = plain_sweep.forward(student.double(), teacher.double(), *small, 0.5)
    attention = (exact.teacher_cells / 24).softmax(1)
    assert (attention.amax(1) > 1 - 1e-12).all()
    for name, wanted in exact._asdict().items():
        assert_near(getattr(found, name), wanted, 1e-4, name)


def test_equal_inputs_give_equal_bits():
    arguments, slopes = inputs(2, 48, 13, 17)
    arguments = in_dtypes(arguments, torch.float32, torch.float32)
    first, second = (
        (*sweep_triton.forward_sweep(*arguments, 0.5),)
        + sweep_triton.backward_sweep(*arguments[:4], slopes)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_terms_and_their_gradients_equal_the_definition():
    """Through autograd: values of the four terms, gradients of the map and of all parameters."""
    contexts = [GlobalContext(20).to(DEVICE, torch.float64) for _ in range(2)]
    for i, parameter in enumerate(p for module in contexts for p in module.parameters()):
        parameter.data.copy_(plain_sweep.random(*parameter.shape, seed=i, scale=0.3))
    (student, teacher, _, _, *weights), _ = inputs(2, 20, 4, 12, scale=0.3)
    weights = [x.view(2, 4, 12) for x in weights]

    def found(terms, **kernels):
        leaf = student.clone().requires_grad_()
        values = terms(leaf, teacher, *weights, *contexts, 0.5, **kernels)
        total = sum(scale * x for scale, x in zip((1.0, 0.7, 0.4, 0.2), values.values()))
        leaves = leaf, *(p for module in contexts for p in module.parameters())
        return (*values.values(), *torch.autograd.grad(total, leaves))

    wanted = found(composed_terms)
    assert len(wanted) == 4 + 1 + 2 * 8
    for i, pair in enumerate(zip(found(fused_terms, kernels=sweep_triton), wanted)):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"{i}: {m}")


FAULTS = [
    ("real = p < P", "real = p < P - 1"),
    ("tl.abs(s), axis=1", "s, axis=1"),
    ("context_s = context_s * shrink", "context_s = context_s"),
    ("inner = inner * shrink", "inner = inner"),
    ("response * SHARPNESS", "response"),
    ("d - mean[:, None], 0.0", "d, 0.0"),
    ("squared += apart * apart", "squared += 0 * apart"),
    ("tl.exp(highest - tl.max(highest, axis=0))", "tl.exp(highest - highest)"),
    ("2, 5, step) * P", "2, 5, step)"),
    ("apart * apart * size[:, None]", "apart * size[:, None]"),
    ("row = n * (stride_n", "row = 0 * (stride_n"),
    ("along_s - mean_s", "along_s"),
    ("grad_t += tl.sum(t * q_t", "grad_t += tl.sum(t * q_s"),
    ("s < 0, -towards", "s <= 0, -towards"),
    ("scale[:, None] + everywhere", "scale[:, None]"),
    ("w_s[:, None] * q_s[None, :]", "w_s[:, None] * soft[None, :]"),
]


@pytest.mark.parametrize("right, wrong", FAULTS)
def test_the_comparison_notices_a_changed_kernel(right, wrong, tmp_path, monkeypatch):
    with open(sweep_kernels.__file__, encoding="utf-8") as file:
        source = file.read()
    assert right in source
    path = tmp_path / "faulty.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("faulty", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    monkeypatch.setattr(sweep_triton, "kernels", faulty)
    monkeypatch.setattr(sweep_triton, "_PROGRAMS_PER_PROCESSOR", 4)  # runs of two tiles and of one
    with pytest.raises(AssertionError, match="times the tolerance"):
        check(*inputs(2, 48, 9, 15))
