import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fgd.bench.per_box import PerBoxFGD
from fgd.distillation.features import Level
from fgd.distillation.methods import FGD, METHOD_REGISTRY, terms_function
from fgd.loss import tiles
from fgd.loss.fused import fused_terms
from fgd.loss.masks import cell_weights
from fgd.loss.terms import TERMS, Weights

LEVELS = [Level("p3", 4, 4), Level("p4", 2, 4)]
BOXES = [torch.tensor([[3.0, 3, 30, 20]]), torch.zeros(0, 4)]
SIZES = [(30, 50), (32, 64)]


def pyramids(seed=0):
    g = torch.Generator().manual_seed(seed)
    maps = lambda c3, c4: {  # noqa: E731
        "p3": torch.randn(2, c3, 4, 8, generator=g),
        "p4": torch.randn(2, c4, 2, 4, generator=g),
        "p9": torch.full((1,), torch.nan),  # a level that is not distilled is never looked at
    }
    return maps(4, 2), maps(4, 4)


def make(reference="padded", terms=fused_terms):
    torch.manual_seed(3)
    return FGD(LEVELS, Weights(1.0, 0.5, 0.25, 0.125), 0.5, reference, terms)


def test_terms_are_summed_over_levels_and_levels_are_logged():
    method = make()
    student, teacher = pyramids()
    losses = method(student, teacher, BOXES, SIZES, (32, 64))
    assert list(losses) == [f"loss_fgd_{term}" for term in TERMS]
    assert method.level_totals.keys() == {"p3", "p4"}
    total = sum(losses.values())
    torch.testing.assert_close(total.detach(), sum(method.level_totals.values()))
    assert total.requires_grad and not method.level_totals["p3"].requires_grad


def test_mask_reference_changes_only_the_masked_terms():
    student, teacher = pyramids()
    padded, image = (make(r)(student, teacher, BOXES, SIZES, (32, 64)) for r in ("padded", "image"))
    for term in ("attention", "relation"):
        torch.testing.assert_close(padded[f"loss_fgd_{term}"], image[f"loss_fgd_{term}"])
    assert padded["loss_fgd_foreground"] != image["loss_fgd_foreground"]
    same = make("image")(student, teacher, BOXES, [(32, 64)] * 2, (32, 64))
    torch.testing.assert_close(same["loss_fgd_foreground"], padded["loss_fgd_foreground"])


def test_implementations_agree():
    student, teacher = pyramids()
    fused, composed = (
        make(terms=terms_function(name))(student, teacher, BOXES, SIZES, (32, 64))
        for name in ("torch", "composed")
    )
    for name, value in fused.items():
        torch.testing.assert_close(value, composed[name], rtol=1e-5, atol=0)


class Recorder(TorchDispatchMode):
    """Names of all operators that run under it, the backward pass included."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name().split("::")[1])
        return function(*args, **(kwargs or {}))


# A GPU is waited for by reading a value, by a shape that depends on values, and by an index or a
# tensor that is made from a Python list on the device.
WAITING = {"_local_scalar_dense", "nonzero", "index.Tensor", "masked_select", "equal", "_unique2"}


def test_the_host_never_waits_for_a_value(monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE", 40)  # many tiles
    student, teacher = pyramids()
    for name in ("p3", "p4"):
        student[name].requires_grad_()

    def seen(method):
        with Recorder() as recorder:
            losses = method(student, teacher, BOXES, SIZES, (32, 64))
            sum(losses.values()).backward()
        return recorder.seen

    ours = seen(make())
    assert "mv" in ours and not ours & WAITING
    assert seen(PerBoxFGD(LEVELS, Weights(1.0, 1.0, 1.0, 1.0), 0.5)) & WAITING


def test_float64_maps_have_float64_masks():
    student, teacher = ({k: v.double() for k, v in x.items()} for x in pyramids())
    method = make().double()
    losses = method(student, teacher, BOXES, SIZES, (32, 64))
    exact = 0.0
    for name, level in method.levels.items():
        masks = cell_weights(BOXES, student[name].shape[-2:], [(32, 64)] * 2, torch.float64)
        exact += level(student[name], teacher[name], *masks)["foreground"].item()
    assert losses["loss_fgd_foreground"].item() == pytest.approx(exact, rel=1e-13)


def test_unequal_grids_name_the_level():
    student, teacher = pyramids()
    teacher["p4"] = torch.randn(2, 4, 2, 5)
    with pytest.raises(ValueError, match="FGD level 'p4'"):
        make()(student, teacher, BOXES, SIZES, (32, 64))


def test_two_halves_of_a_batch_average_to_the_whole():
    # What data parallelism needs: every term is a mean over the images of a process.
    student, teacher = pyramids()
    method = make()
    whole = method(student, teacher, BOXES, SIZES, (32, 64))
    for term, value in whole.items():
        halves = [
            method(
                *({k: v[i : i + 1] for k, v in f.items()} for f in (student, teacher)),
                BOXES[i : i + 1],
                SIZES[i : i + 1],
                (32, 64),
            )[term]
            for i in range(2)
        ]
        torch.testing.assert_close(sum(halves) / 2, value)


def test_registered(tiny_cfg):
    cfg = tiny_cfg()
    cfg.MODEL.DISTILLER.FGD.RELATION_WEIGHT = 7.0
    method = METHOD_REGISTRY.get("FGD").from_config(cfg, LEVELS)
    assert method.levels["p4"].weights == Weights(1e-3, 5e-4, 5e-4, 7.0)
    assert method.levels["p4"].align.weight.shape == (4, 2, 1, 1)
    assert method.levels["p3"].align is None
