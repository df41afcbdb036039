import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgd.config import check_config, load_config
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.fbkd import FBKD, FBKDLevel, NonLocal, cell_mask, feature_term, pool
from tests.fgd.methods.batches import make_batch as make_method_batch
from tests.fgd.methods.fbkd_reference import reference_terms
from tests.fgd.methods.fgd.test_method import WAITING, Recorder
from tests.fgd.training import distilled

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "tests" / "golden" / "fbkd").glob("*.npz"))
# MMRazor's names of modules and ours.
BLOCK = {
    "g.conv": "g",
    "g.0.0.conv": "g",
    "phi.conv": "phi",
    "phi.0.0.conv": "phi",
    "theta.conv": "theta",
    "conv_out.conv": "out",
    "conv_out.norm": "norm",
}
NAMES = {
    "student.channel_wise_adaptation": "channel",
    "student.spatial_wise_adaptation": "spatial",
    "student.adaptation_layers": "adapt",
    "student.non_local_adaptation": "adapt_non_local",
    **{
        f"{who}.{who}_non_local.{theirs}": f"{who}.{ours}"
        for who in ("student", "teacher")
        for theirs, ours in BLOCK.items()
    },
}
SHAPES = [(2, 3, 3, 4), (1, 2, 1, 5), (1, 4, 1, 1), (3, 2, 4, 1)]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def randomize(module, seed=0):
    """Parameters away from their initial values, where the blocks are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double()


@functools.cache
def load(path):
    """Content, parameters and gradients by our names."""
    content = dict(np.load(path).items())
    parameters, gradients, start = {}, {}, 0
    for name, shape in zip(content["param_names"], content["param_shapes"]):
        shape = [int(x) for x in shape if x]
        rows = slice(start, start + int(np.prod(shape)))
        module, _, kind = name.decode().rpartition(".")
        for found, values in ((parameters, "param_values"), (gradients, "grad_values")):
            own = torch.from_numpy(content[values][rows]).view(shape)
            found[f"{NAMES[module]}.{kind}"] = own
        start = rows.stop
    return content, parameters, gradients


def error(found, wanted):
    """Relative to the largest magnitude of the wanted array, at least 1e-6."""
    wanted = torch.as_tensor(wanted).double()
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_value_and_gradients(path, dtype, tolerance):
    content, parameters, gradients = load(path)
    channels = content["student"].shape[1]
    reduction = channels // len(parameters["student.theta.bias"])
    pools = math.prod(content["pools"].tolist())  # successive pools are one of the product
    mode, temperature = str(content["mode"]), float(content["spatial_temperature"])
    level = Level("p3", channels, channels)
    weights = {term: float(content[f"weight_{term.replace('_', '')}"]) for term in FBKD.terms}
    method = FBKD([level], weights, [reduction], [pools], mode, temperature).to(dtype)
    method.levels["p3"].load_state_dict(parameters)
    student, teacher = (torch.from_numpy(content[k]).to(dtype) for k in ("student", "teacher"))
    student.requires_grad_()
    boxes = [torch.zeros(0, 4)] * len(student)
    terms = method(make_method_batch({"p3": student}, {"p3": teacher}, boxes, (64, 64)))["p3"]
    for term, value in terms.items():
        assert error(value.detach(), content[f"loss_{term.replace('_', '')}"]) <= tolerance
    total = sum(terms.values())
    total.backward()
    assert error(total.detach(), content["loss"]) <= tolerance
    assert error(student.grad, content["grad_student"]) <= tolerance
    named = dict(method.levels["p3"].named_parameters())
    assert named.keys() == gradients.keys()
    for name, wanted in gradients.items():
        assert error(named[name].grad, wanted) <= tolerance, name


def test_there_are_four_golden_cases():
    assert len(FILES) == 4


@pytest.mark.parametrize("mode", ["dot_product", "embedded_gaussian"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_equals_the_literal_reference(shape, size, mode):
    n, channels, height, width = shape
    wider = channels + 1
    module = randomize(FBKDLevel(channels, wider, 2, size, mode, 0.7), seed=size)
    student = random(*shape, seed=1).requires_grad_()
    teacher = random(n, wider, height, width, seed=2)
    parameters = dict(module.named_parameters())
    found = module(student, teacher)
    wanted = reference_terms(student, teacher, parameters, mode, size, 0.7)
    inputs = [student, *parameters.values()]
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    for term in FBKD.terms:
        torch.testing.assert_close(found[term], wanted[term], rtol=1e-11, atol=0)
        grads = [torch.autograd.grad(x[term], inputs, **options) for x in (found, wanted)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_terms_by_hand():
    # Two cells whose mean |x| / τ are 0 and ln 3: m = (0.5, 1.5); the teacher's are equal: (1, 1).
    student = torch.tensor([[[[0.0, 0.5 * math.log(3)]]]], dtype=torch.float64)
    mask = cell_mask(student, torch.ones(1, 1, 1, 2, dtype=torch.float64), 0.5)
    torch.testing.assert_close(mask, torch.tensor([[[0.75, 1.25]]], dtype=torch.float64))
    adapted = torch.tensor([[[[2.0, 0]], [[0, 1]]]], dtype=torch.float64)
    value = feature_term(adapted, torch.zeros_like(adapted), mask)
    assert value.item() == pytest.approx((0.75 * 4 + 1.25 * 1) ** 0.5)


def test_pools():
    features = torch.arange(35.0).view(1, 1, 5, 7)
    assert pool(features, 2)[0, 0].tolist() == [[8, 10, 12], [22, 24, 26]]
    twice = torch.nn.functional.max_pool2d(
        torch.nn.functional.max_pool2d(random(1, 2, 17, 26), 2), 3
    )
    assert torch.equal(pool(random(1, 2, 17, 26), 6), twice)  # as MMRazor does
    assert torch.equal(pool(features, 1), features)
    # Larger than the map: cut to it, each side for itself.
    assert pool(features, 16)[0, 0].tolist() == [[34]]
    assert pool(features, 6)[0, 0].tolist() == [[33]]


def test_the_mask_has_no_gradient():
    module = randomize(FBKDLevel(2, 2))
    student, teacher = random(1, 2, 2, 3).requires_grad_(), random(1, 2, 2, 3, seed=1)
    mask = cell_mask(student, teacher, 0.5)
    assert not mask.requires_grad and mask.sum().item() == pytest.approx(6)
    (found,) = torch.autograd.grad(module(student, teacher)["feature"], student)
    (wanted,) = torch.autograd.grad(feature_term(module.adapt(student), teacher, mask), student)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("mode", ["dot_product", "embedded_gaussian"])
def test_a_new_block_changes_nothing_and_learns(mode):
    block = NonLocal(64, 4, 2, mode)
    assert block.theta.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not block.g.bias.any() and block.out.bias is None
    features = torch.randn(2, 64, 4, 6)
    out = block(features)
    assert torch.equal(out, features)
    out.square().sum().backward()
    assert block.norm.weight.grad.abs().min() > 0
    assert dict(block.named_buffers()) == {}  # no running statistics


def test_equal_sides_give_zero_with_a_zero_gradient():
    module = FBKDLevel(2, 2).double()
    for conv in (module.adapt, module.adapt_non_local, module.spatial):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    torch.nn.init.eye_(module.channel.weight)
    torch.nn.init.zeros_(module.channel.bias)
    teacher = random(1, 2, 3, 3)
    student = teacher.clone().requires_grad_()
    terms = module(student, teacher)
    sum(terms.values()).backward()
    assert all(value == 0 for value in terms.values()) and student.grad.abs().max() == 0


@pytest.mark.parametrize("mode", ["dot_product", "embedded_gaussian"])
def test_gradcheck(mode):
    module = randomize(FBKDLevel(2, 3, 1, 2, mode))
    teacher = random(1, 3, 3, 4, seed=1)
    names = [name for name, _ in module.named_parameters()]

    def values(student, *parameters):
        given = dict(zip(names, parameters, strict=True))
        # The mask is a constant of the gradient, so it may not move either.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fgd.methods.fbkd.cell_mask", lambda *_: mask)
            return tuple(torch.func.functional_call(module, given, (student, teacher)).values())

    student = random(1, 2, 3, 4).requires_grad_()
    mask = cell_mask(student, teacher, 0.5)
    assert torch.autograd.gradcheck(values, (student, *module.parameters()))


# The method.

LEVELS = [Level("p3", 2, 3, "p3", 8), Level("p4", 2, 3, "p4", 16), Level("p5", 2, 3, "p5", 32)]
SIZE = (96, 96)


def batch(dtype=torch.float64, count=2):
    generator = torch.Generator().manual_seed(4)
    sides = [
        {
            level.name: torch.randn(
                count, c, SIZE[0] // level.stride, SIZE[1] // level.stride, generator=generator
            ).to(dtype)
            for level in LEVELS
        }
        for c in (2, 3)
    ]
    for own in sides[0].values():
        own.requires_grad_()
    boxes = [torch.tensor([[3.0, 4, 40, 50]]), torch.zeros(0, 4)][:count]
    return make_method_batch(*sides, boxes, SIZE)


def build(levels=LEVELS, **options):
    weights = dict(zip(FBKD.terms, (1.0, 2.0, 3.0, 4.0)))
    return randomize(FBKD(levels, weights, **options))


@pytest.mark.parametrize("mode", ["dot_product", "embedded_gaussian"])
def test_a_table_of_small_maps(mode):
    # 12, 6 and 3 cells a side: the published pools of 16, 8 and 4 cells fit none of them.
    method, given = build(LEVELS[::-1], mode=mode), batch()
    table = method(given)
    assert list(table) == ["p3", "p4", "p5"]  # finest first, whatever the order given
    assert [x.student.pool_size for x in method.levels.values()] == [16, 8, 4]
    assert [len(x.student.theta.bias) for x in method.levels.values()] == [1, 1, 1]
    for name, terms in table.items():
        assert list(terms) == list(FBKD.terms)
        plain = method.levels[name](given.student[name], given.teacher[name])
        for factor, (term, value) in enumerate(plain.items(), 1):
            torch.testing.assert_close(terms[term], factor * value)
    sum(x for terms in table.values() for x in terms.values()).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in given.student.values())
    method.weights = dict.fromkeys(FBKD.terms, 0.0)
    assert all(value == 0 for terms in method(given).values() for value in terms.values())


def test_boxes_do_not_matter():
    method, given = build(), batch()
    found = method(given)
    given.instances = [x[:0] for x in given.instances]
    for name, terms in method(given).items():
        assert all(torch.equal(value, found[name][term]) for term, value in terms.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["dot_product", "embedded_gaussian"])
def test_half_precision(mode, dtype):
    exact = build(mode=mode)
    method = copy.deepcopy(exact).float()
    given = batch(dtype)
    table = method(given)
    sides = [{k: v.detach().double() for k, v in x.items()} for x in (given.student, given.teacher)]
    wanted = exact(make_method_batch(*sides, given.boxes, SIZE))
    for name, terms in table.items():
        for term, value in terms.items():
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(wanted[name][term].item(), rel=1e-4)
    sum(x for terms in table.values() for x in terms.values()).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in given.student.values())


@pytest.mark.parametrize("mode", ["dot_product", "embedded_gaussian"])
def test_the_host_never_waits_for_a_value(mode):
    method, given = build(mode=mode), batch()
    with Recorder() as recorder:
        sum(x for terms in method(given).values() for x in terms.values()).backward()
    assert "max_pool2d_with_indices" in recorder.seen and not recorder.seen & WAITING


def test_pictures_show_the_weight_of_cells():
    method, given = build(), batch()
    found = method.pictures(given, 1)
    assert list(found["p4"]) == ["teacher response", "student response", "weight of cells"]
    values = found["p4"]["weight of cells"].values
    assert values.shape == (6, 6) and values.sum() == pytest.approx(36, rel=1e-5)
    alone = cell_mask(given.student["p4"][1:], given.teacher["p4"][1:], 0.5)[0]
    np.testing.assert_allclose(values, alone.numpy(), rtol=1e-5)


def test_defaults(tiny_cfg):
    cfg = tiny_cfg()
    assert dict(cfg.MODEL.DISTILLER.FBKD) == {
        "FEATURE_WEIGHT": 7e-5,
        "CHANNEL_WEIGHT": 4e-3,
        "SPATIAL_WEIGHT": 4e-3,
        "NON_LOCAL_WEIGHT": 7e-5,
        "TEMPERATURE": 0.5,
        "MODE": "dot_product",
        "REDUCTIONS": [4, 4, 2, 2],
        "POOLS": [16, 8, 4, 4],
    }
    assert FBKD.choose_levels(["p3", "p4", "p5", "p6", "p7"], []) == ["p3", "p4", "p5", "p6"]
    cfg.MODEL.DISTILLER.FBKD.MODE = "embedded_gaussian"
    cfg.MODEL.DISTILLER.FBKD.TEMPERATURE = 0.25
    levels = [Level(f"p{k}", 16, 8, f"p{k}", 2**k) for k in range(2, 7)]
    method = FBKD.from_config(cfg, levels)
    assert method.weights == dict(zip(FBKD.terms, (7e-5, 4e-3, 4e-3, 7e-5)))
    blocks = [x.student for x in method.levels.values()]
    assert [x.pool_size for x in blocks] == [16, 8, 4, 4, 4]
    assert [len(x.g.bias) for x in blocks] == [4, 4, 8, 8, 8]
    assert len(method.levels["p2"].teacher.g.bias) == 2
    assert {x.mode for x in blocks} == {"embedded_gaussian"}
    assert {x.temperature for x in method.levels.values()} == {0.25}


def test_the_published_pair():
    cfg = load_config(str(ROOT / "configs" / "fbkd_frcnn.yaml"), ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.DISTILLER.METHOD == "FBKD"
    assert FBKD.choose_levels(cfg.MODEL.ROI_HEADS.IN_FEATURES, []) == ["p2", "p3", "p4", "p5"]


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("MODE", "gaussian", "'gaussian' is none of dot_product, embedded_gaussian"),
        ("TEMPERATURE", 0.0, "0.0 is not above 0"),
        ("TEMPERATURE", float("nan"), "nan is not above 0"),
        ("POOLS", [16, 0], "[16, 0] is not a list of whole numbers of at least 1"),
        ("REDUCTIONS", [], "[] is not a list"),
        ("SPATIAL_WEIGHT", -1.0, "-1.0 is not a finite weight"),
    ],
)
def test_refusals(key, value, words, tiny_cfg, tmp_path):
    cfg = distilled(tiny_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "FBKD"
    check_config(cfg)
    cfg.MODEL.DISTILLER.FBKD[key] = value
    with pytest.raises(UserError) as caught:
        check_config(cfg)
    assert str(caught.value).startswith(f"MODEL.DISTILLER.FBKD.{key}: {words}")


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_it_teaches_a_student(arch, tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg(arch), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "FBKD"
    model = build_model(cfg)
    given = make_batch()
    given[0]["instances"] = given[0]["instances"][:0]  # an image without objects
    with EventStorage():
        losses = model(given)
    own = {k: v for k, v in losses.items() if k.startswith("loss_fbkd_")}
    assert set(own) == set(model.distillation.loss_names)
    assert all(value.isfinite() and value > 0 for value in own.values())
    first = 3 if arch == "RetinaNet" else 2
    assert list(model.table) == [f"p{k}" for k in range(first, first + 4)]
    sum(own.values()).backward()
    assert next(model.student.backbone.bottom_up.parameters()).grad.abs().max() > 0
    for name, parameter in model.distillation.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for level in model.distillation.levels.values():
        # At first a block is the identity, so only its norm learns.
        for module in (level.adapt, level.channel, level.spatial, level.student.norm):
            assert module.weight.grad.any()
