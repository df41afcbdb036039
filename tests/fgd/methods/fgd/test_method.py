import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fgd.bench.per_box import PerBoxFGD
from fgd.methods.batch import Level
from fgd.methods.fgd import tiles
from fgd.methods.fgd.fused import fused_terms
from fgd.methods.fgd.masks import cell_weights
from fgd.methods.fgd.method import FGD, terms_function
from fgd.methods.fgd.terms import TERMS, Weights
from fgd.methods.method import METHOD_REGISTRY, over_levels
from tests.fgd.methods.batches import make_batch

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


def batch(student, teacher, image_sizes=SIZES, boxes=BOXES):
    return make_batch(student, teacher, boxes, (32, 64), image_sizes=image_sizes)


def make(reference="padded", terms=fused_terms):
    torch.manual_seed(3)
    return FGD(LEVELS, Weights(1.0, 0.5, 0.25, 0.125), 0.5, reference, terms)


def test_the_table_has_every_term_of_every_level():
    method = make()
    table = method(batch(*pyramids()))
    assert list(table) == ["p3", "p4"] and all(list(x) == list(TERMS) for x in table.values())
    assert method.loss_names == tuple(f"loss_fgd_{term}" for term in TERMS)
    named = method.table(batch(*pyramids()))
    assert list(named["p4"]) == [f"fgd_{term}" for term in TERMS]
    sums = over_levels(named)
    for term in TERMS:
        wanted = table["p3"][term] + table["p4"][term]
        torch.testing.assert_close(sums[f"fgd_{term}"], wanted)
        assert wanted.requires_grad


def test_mask_reference_changes_only_the_masked_terms():
    maps = pyramids()
    padded, image = (over_levels(make(r)(batch(*maps))) for r in ("padded", "image"))
    for term in ("attention", "relation"):
        torch.testing.assert_close(padded[term], image[term])
    assert padded["foreground"] != image["foreground"]
    same = over_levels(make("image")(batch(*maps, image_sizes=[(32, 64)] * 2)))
    torch.testing.assert_close(same["foreground"], padded["foreground"])


def test_implementations_agree():
    student, teacher = pyramids()
    fused, composed = (
        over_levels(make(terms=terms_function(name))(batch(student, teacher)))
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

    given = batch(student, teacher)

    def seen(method):
        with Recorder() as recorder:
            sum(over_levels(method(given)).values()).backward()
        return recorder.seen

    ours = seen(make())
    assert "mv" in ours and not ours & WAITING
    assert seen(PerBoxFGD(LEVELS, Weights(1.0, 1.0, 1.0, 1.0), 0.5)) & WAITING


def test_float64_maps_have_float64_masks():
    student, teacher = ({k: v.double() for k, v in x.items()} for x in pyramids())
    method = make().double()
    losses = over_levels(method(batch(student, teacher)))
    exact = 0.0
    for name, level in method.levels.items():
        masks = cell_weights(BOXES, student[name].shape[-2:], [(32, 64)] * 2, torch.float64)
        exact += level(student[name], teacher[name], *masks)["foreground"].item()
    assert losses["foreground"].item() == pytest.approx(exact, rel=1e-13)


def test_unequal_grids_name_the_level():
    student, teacher = pyramids()
    teacher["p4"] = torch.randn(2, 4, 2, 5)
    with pytest.raises(ValueError, match="FGD level 'p4'"):
        make()(batch(student, teacher))


def test_two_halves_of_a_batch_average_to_the_whole():
    # What data parallelism needs: every term is a mean over the images of a process.
    maps = pyramids()
    method = make()
    whole = over_levels(method(batch(*maps)))
    halves = [
        over_levels(
            method(
                batch(
                    *({k: v[i : i + 1] for k, v in f.items()} for f in maps),
                    SIZES[i : i + 1],
                    BOXES[i : i + 1],
                )
            )
        )
        for i in range(2)
    ]
    for term, value in whole.items():
        torch.testing.assert_close((halves[0][term] + halves[1][term]) / 2, value)


def test_registered(tiny_cfg):
    cfg = tiny_cfg()
    cfg.MODEL.DISTILLER.FGD.RELATION_WEIGHT = 7.0
    method = METHOD_REGISTRY.get("FGD").from_config(cfg, LEVELS)
    assert method.levels["p4"].weights == Weights(1e-3, 5e-4, 5e-4, 7.0)
    assert method.levels["p4"].align.weight.shape == (4, 2, 1, 1)
    assert method.levels["p3"].align is None
