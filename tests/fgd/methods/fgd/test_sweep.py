import pytest
import torch

from fgd.methods.fgd import sweep, tiles

from . import plain_sweep

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def check(arguments, slopes, tolerance):
    """Both sweeps against the plain formulas in float64, on the same rounded inputs."""
    dtype = sweep.small_dtype(*arguments[:2])
    arguments = *arguments[:2], *(x.to(dtype) for x in arguments[2:])
    slopes = sweep.Slopes(*(x.to(dtype) for x in slopes))
    exact = [x.double() for x in arguments]

    def close(actual, wanted, name, tolerance=tolerance):
        assert actual.shape == wanted.shape
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm(), name

    for name, wanted in plain_sweep.forward(*exact, 0.7)._asdict().items():
        close(getattr(sweep.forward_sweep(*arguments, 0.7), name), wanted, name)
    wanted = plain_sweep.backward(*exact[:3], sweep.Slopes(*(x.double() for x in slopes)))
    actual = sweep.backward_sweep(*arguments[:4], slopes)
    assert actual[0].dtype == arguments[0].dtype
    rounding = 0 if actual[0].dtype == dtype else torch.finfo(actual[0].dtype).eps
    close(actual[0], wanted[0], "gradient", tolerance + rounding)
    for name, pair in zip(("mask_student", "mask_teacher"), zip(actual[1:], wanted[1:])):
        close(*pair, name)
    return actual[0]


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 3, 7, 10), (2, 48, 9, 11)], ids=str)
@pytest.mark.parametrize("tile", [1, 100, 1000, 10**6])
def test_equals_the_plain_formulas_in_any_tiling(shape, tile, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE", tile)
    check(*plain_sweep.inputs(*shape), 1e-12)


@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
def test_dtypes(student, teacher, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE", 100)
    (s, t, *small), slopes = plain_sweep.inputs(2, 6, 7, 5)
    tolerance = 1e-12 if torch.float64 in (student, teacher) else 2e-6
    check((s.to(student), t.to(teacher), *small), slopes, tolerance)


def layouts(x):
    wide = torch.full((*x.shape[:3], x.shape[3] + 3), torch.nan, dtype=x.dtype)
    wide[..., 2:-1] = x
    yield wide[..., 2:-1]
    yield x.to(memory_format=torch.channels_last)
    yield x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("tile", [100, 10**6])
@pytest.mark.parametrize("which", range(3))
def test_layouts(which, tile, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE", tile)
    (s, t, *small), slopes = plain_sweep.inputs(2, 6, 5, 7)
    strided = [list(layouts(x))[which] for x in (s, t)]
    assert not strided[0].is_contiguous()
    gradients = [check((a, b, *small), slopes, 1e-12) for a in (s, strided[0]) for b in strided]
    if which == 1:
        assert gradients[-1].is_contiguous(memory_format=torch.channels_last)


def test_equal_maps_have_no_error_at_all():
    (s, _, *small), _ = plain_sweep.inputs(2, 6, 5, 7)
    found = sweep.forward_sweep(s, s.clone(), *small, 0.5)
    for values in (found.error, found.squared, found.foreground, found.background):
        assert values.abs().max() == 0
