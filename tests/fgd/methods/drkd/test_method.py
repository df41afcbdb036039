import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgd.config import check_config
from fgd.distillation.levels import Outputs, plan_levels
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.drkd import DRKD
from fgd.methods.drkd.pixel import GraphReasoning
from fgd.methods.parts import BatchNorm
from tests.fgd.methods.batches import make_batch as make_method_batch
from tests.fgd.methods.drkd.test_pixel import randomize
from tests.fgd.methods.fgd.test_method import WAITING, Recorder
from tests.fgd.training import distilled

LEVELS = [Level("p3", 2, 3, "p3", 8), Level("p4", 2, 3, "p4", 16), Level("p5", 2, 3, "p5", 32)]
ONES = dict.fromkeys(DRKD.terms, 1.0)
SIZE = (64, 96)
BOXES = [torch.tensor([[3.0, 4, 40, 50], [10, 20, 90, 60]]), torch.tensor([[0.0, 0, 30, 64]])]
NONE = torch.zeros(0, 4)


def batch(boxes=BOXES, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(4)
    sides = []
    for channels in (2, 3):
        maps = {}
        for level in LEVELS:
            shape = len(boxes), channels, SIZE[0] // level.stride, SIZE[1] // level.stride
            maps[level.name] = torch.randn(shape, generator=generator).to(dtype)
        sides.append(maps)
    for own in sides[0].values():
        own.requires_grad_()
    return make_method_batch(*sides, boxes, SIZE, **options)


def build(form="paper", filtered="trained", levels=LEVELS, norm="BN", seed=0):
    return randomize(DRKD(levels, ONES, form, filtered, [3, 2], norm, (0, 4)), seed)


def test_levels_and_terms():
    method = build(levels=LEVELS[::-1])
    table = method(batch())
    assert list(table) == ["p3", "p4", "p5"]  # finest first, whatever the order given
    assert list(table["p4"]) == list(DRKD.terms) and list(table["p5"]) == ["pixel_relation"]
    assert [len(x.student.nodes.weight) for x in method.pixel.values()] == [3, 2, 2]
    assert method.loss_names == tuple(f"loss_drkd_{term}" for term in DRKD.terms)


def test_terms_are_those_of_the_levels():
    given = batch()
    method = build()
    method.weights = dict(zip(DRKD.terms, (2.0, 3.0, 5.0)))
    table = method(given)
    for name, terms in table.items():
        wanted = method.pixel[name](given.student[name], given.teacher[name]) * 2 / 3
        torch.testing.assert_close(terms["pixel_relation"], wanted)
    method.weights = ONES
    plain = method(given)
    for term, factor in (("instance_relation", 3.0), ("instance_feature", 5.0)):
        torch.testing.assert_close(table["p4"][term], factor * plain["p4"][term])
    method.weights = dict.fromkeys(DRKD.terms, 0.0)
    assert all(value == 0 for terms in method(given).values() for value in terms.values())


def test_scales():
    odd = batch()
    odd.student = {"p3": torch.zeros(2, 2, 8, 13), "p4": torch.zeros(2, 2, 4, 7)}
    odd.student["p5"] = torch.zeros(2, 2, 2, 4)
    assert build()._scales(odd) == [1 / 8, 1 / 16, 1 / 32]
    assert build("code")._scales(odd) == [1 / 8, 7 / 104, 4 / 104]
    unknown = [level._replace(stride=0) for level in LEVELS]  # by the padded width
    assert build(levels=unknown)._scales(batch()) == [1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize("filtered", ["trained", "random", "none"])
@pytest.mark.parametrize("form", ["paper", "code"])
def test_images_without_boxes(form, filtered):
    method = build(form, filtered)
    given = batch([BOXES[0], NONE])
    full, half = method(batch([BOXES[0], BOXES[1]])), method(given)
    assert 0 < half["p3"]["instance_feature"] < full["p3"]["instance_feature"]
    empty = batch([NONE, NONE])
    table = method(empty)
    for name in ("p3", "p4"):
        instance = table[name]["instance_relation"] + table[name]["instance_feature"]
        assert instance == 0
        (gradient,) = torch.autograd.grad(instance, empty.student[name], retain_graph=True)
        assert gradient.abs().max() == 0
        assert table[name]["pixel_relation"] > 0
    sum(x for terms in table.values() for x in terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_random_filters_depend_on_seed_iteration_rank_and_place_alone():
    method = build("code", "random")
    relation = lambda **options: method(batch(**options))["p3"]["instance_relation"].item()  # noqa: E731
    first = relation(iteration=3, seed=1)
    assert relation(iteration=3, seed=1) == first
    others = [relation(iteration=4, seed=1), relation(iteration=3), relation()]
    others.append(relation(iteration=3, seed=1, rank=1))
    assert len({first, *others}) == 5
    drawn = [
        method._filters(batch(), key, torch.zeros(3, 18, dtype=torch.float64))
        for key in ((0, 0), (0, 1), (1, 0))
    ]
    weights = [weight for images in drawn for weight, _ in images]
    assert [len(x) for x in weights] == [2, 1] * 3
    assert len({x[0, 0].item() for x in weights}) == 6


@pytest.mark.parametrize("form, filtered", [("paper", "trained"), ("code", "random")])
def test_the_host_never_waits_for_a_value(form, filtered):
    method, given = build(form, filtered), batch()
    with Recorder() as recorder:
        sum(x for terms in method(given).values() for x in terms.values()).backward()
    assert "roi_align" in "".join(recorder.seen) and not recorder.seen & WAITING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["paper", "code"])
def test_half_precision(form, dtype):
    exact = build(form)
    method = copy.deepcopy(exact).float()
    given = batch(dtype=dtype)
    table = method(given)
    double = lambda maps: {k: v.detach().double() for k, v in maps.items()}  # noqa: E731
    wanted = exact(make_method_batch(double(given.student), double(given.teacher), BOXES, SIZE))
    for name, terms in table.items():
        for term, value in terms.items():
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(wanted[name][term].item(), rel=1e-4)
    sum(x for terms in table.values() for x in terms.values()).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in given.student.values())


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_one_cell_of_one_image(form, norm):
    level = Level("p7", 2, 3, "p7", 128)
    method = build(form, levels=[level], norm=norm)
    student = torch.randn(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    given = make_method_batch({"p7": student}, {"p7": teacher}, [BOXES[0]], (100, 90))
    sum(method(given)["p7"].values()).backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_batch_norm_of_one_value_is_its_bias():
    norm = BatchNorm(2)
    assert norm.weight.tolist() == [0, 0] and not list(norm.buffers())
    torch.nn.init.ones_(norm.weight)
    norm.bias.data = torch.tensor([1.0, -2.0])
    one = norm(torch.randn(1, 2, 1, 1, dtype=torch.float32)).flatten()
    torch.testing.assert_close(one, norm.bias, rtol=1e-5, atol=0)
    features = torch.randn(2, 2, 3, 3)
    wanted = torch.nn.functional.batch_norm(
        features, None, None, norm.weight, norm.bias, training=True
    )
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(features), wanted)


def test_defaults(tiny_cfg):
    cfg = tiny_cfg()
    assert dict(cfg.MODEL.DISTILLER.DRKD) == {
        "PIXEL_RELATION_WEIGHT": 1e-6,
        "INSTANCE_RELATION_WEIGHT": 0.25,
        "INSTANCE_FEATURE_WEIGHT": 2e-4,
        "FORM": "paper",
        "FILTER": "trained",
        "FILTER_WIDTH": 64,
        "RELATION_WIDTH": 0,
        "NODES": [64, 64, 256, 256, 256],
        "NORM": "BN",
    }
    cfg.MODEL.DISTILLER.DRKD.NORM = "GN"
    cfg.MODEL.DISTILLER.DRKD.RELATION_WIDTH = 7
    method = DRKD.from_config(cfg, LEVELS)
    assert method.weights == dict(zip(DRKD.terms, (1e-6, 0.25, 2e-4)))
    assert (method.form, method.filtered) == ("paper", "trained")
    instance = method.instance["p4"].teacher
    assert (len(instance.theta.weight), len(instance.rows.weight)) == (7, 64)
    assert isinstance(method.pixel["p5"].student.norm, torch.nn.GroupNorm)
    assert [len(x.teacher.nodes.weight) for x in method.pixel.values()] == [64, 64, 256]


def test_default_terms_are_of_comparable_size(tiny_cfg):
    """Maps of unit variance that change slowly, an eighth of 800x1344 pixels a side.

    The pixel term is a sum over cells, so a 64th of what it is at full size.
    """
    generator = torch.Generator().manual_seed(0)
    levels = [Level(f"p{k}", 64, 64, f"p{k}", 2**k) for k in range(3, 8)]
    cfg = tiny_cfg()
    method = DRKD.from_config(cfg, levels)

    def maps():
        found = {}
        for level in levels:
            height, width = (-(-size // level.stride) for size in (104, 168))
            coarse = torch.randn(2, 64, -(-height // 4), -(-width // 4), generator=generator)
            own = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
            found[level.name] = own / own.std()
        return found

    boxes = [torch.tensor([[10.0, 10, 60, 70], [40, 20, 150, 90], [80, 50, 120, 100]])] * 2
    table = method(make_method_batch(maps(), maps(), boxes, (104, 168)))
    values = [sum(x[t].item() for x in table.values() if t in x) for t in DRKD.terms]
    quarter = 4.0  # 64 channels instead of 256
    values = [values[0] * 64 * quarter, values[1], values[2] * quarter]
    assert all(0.1 < value < 10 for value in values), values


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("FORM", "Paper", "'Paper' is none of paper, code"),
        ("FILTER", "learned", "'learned' is none of trained, random, none"),
        ("NORM", "SyncBN", "'SyncBN' is none of BN, GN"),
        ("FILTER_WIDTH", 0, "0 is below 1"),
        ("RELATION_WIDTH", -1, "-1 is below 0"),
        ("NODES", [], "[] is not a list of whole numbers of at least 1"),
        ("NODES", [64, 0], "[64, 0] is not a list"),
        ("NODES", [64, 1.5], "[64, 1.5] is not a list"),
        ("PIXEL_RELATION_WEIGHT", -1.0, "-1.0 is not a finite weight"),
    ],
)
def test_refusals(key, value, words, tiny_cfg, tmp_path):
    cfg = distilled(tiny_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "DRKD"
    check_config(cfg)
    cfg.MODEL.DISTILLER.DRKD[key] = value
    with pytest.raises(UserError) as caught:
        check_config(cfg)
    assert str(caught.value).startswith(f"MODEL.DISTILLER.DRKD.{key}: {words}")


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
@pytest.mark.parametrize("form, filtered", [("paper", "trained"), ("code", "random")])
def test_it_teaches_a_student(arch, form, filtered, tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg(arch), tmp_path)
    node = cfg.MODEL.DISTILLER
    node.METHOD = "DRKD"
    node.DRKD.FORM, node.DRKD.FILTER, node.DRKD.NODES = form, filtered, [4, 8]
    model = build_model(cfg)
    outputs = Outputs.of(model.student.backbone)
    assert [level.name for level in plan_levels(cfg, outputs, outputs)[DRKD]] == list(
        model.distillation.pixel
    )
    given = make_batch()
    given[0]["instances"] = given[0]["instances"][:0]  # an image without objects
    with EventStorage():
        losses = model(given)
    own = {k: v for k, v in losses.items() if k.startswith("loss_drkd_")}
    assert set(own) == set(model.distillation.loss_names)
    assert all(value.isfinite() and value > 0 for value in own.values())
    sum(own.values()).backward()
    assert next(model.student.backbone.bottom_up.parameters()).grad.abs().max() > 0
    for name, parameter in model.distillation.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    units = [x for x in model.distillation.modules() if isinstance(x, GraphReasoning)]
    assert len(units) == 2 * len(model.table)
    # At first a unit is the identity, so only its norm learns.
    assert all(unit.norm.weight.grad.any() for unit in units)
    regions = model.distillation.instance["p3"]
    assert regions.student.theta.weight.grad.any() and regions.adapt_feature.weight.grad.any()
