import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.config import check_config, get_fgd_cfg, load_config
from fgd.distillation.levels import Outputs, head_levels, plan_levels
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.method import over_levels
from fgd.methods.pkd import PKD, pearson_term
from tests.fgd.methods.batches import make_batch as make_maps_batch
from tests.fgd.training import distilled

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "pkd").glob("*.npz"))
CONFIGS = Path(__file__).parents[3] / "configs"
NO_BOXES = torch.zeros(0, 4)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def method(channels, resize="student", weight=1.0, count=1):
    levels = [Level(f"p{i}", channels, channels) for i in range(count)]
    return PKD(levels, {"pearson": weight}, resize)


def batch(student, teacher):
    return make_maps_batch(student, teacher, [NO_BOXES] * len(student["p0"]), (64, 64))


def with_gradient(student, teacher, *options):
    student = student.clone().requires_grad_()
    value = pearson_term(student, teacher, *options)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_value_and_gradients(path, dtype, tolerance):
    content = np.load(path)
    count = int(content["num_levels"])
    maps = {
        side: {f"p{i}": torch.from_numpy(content[f"{side}_{i}"]).to(dtype) for i in range(count)}
        for side in ("student", "teacher", "grad_student")
    }
    for value in maps["student"].values():
        value.requires_grad_()
    resize = "student" if content["resize_student"] else "teacher"
    own = method(maps["student"]["p0"].shape[1], resize, float(content["loss_weight"]), count)
    loss = over_levels(own(batch(maps["student"], maps["teacher"])))["pearson"]
    loss.backward()
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(float(content["loss"]), rel=tolerance)
    for name, wanted in maps["grad_student"].items():
        error = (maps["student"][name].grad - wanted).abs().max()
        assert error <= tolerance * wanted.abs().max().clamp(min=1e-6)


def test_there_are_five_golden_cases():
    assert len(GOLDEN) == 5


def golden_vector():
    i = torch.arange(2 * 4 * 5 * 6, dtype=torch.float64)
    student = (torch.sin(0.37 * i + 1.0) + 0.1).view(2, 4, 5, 6)
    return student, (torch.sin(0.37 * i + 2.0) + 0.2).view(2, 4, 5, 6)


def test_golden_vector_couples_the_images_of_a_batch():
    student, teacher = golden_vector()
    whole = pearson_term(student, teacher)
    assert whole.item() == pytest.approx(0.4442827900282127, rel=1e-13)
    halves = [pearson_term(student[i : i + 1], teacher[i : i + 1]).item() for i in range(2)]
    assert sum(halves) / 2 == pytest.approx(0.4373559822903973, rel=1e-13)
    change = pearson_term(3 * student + 2, teacher) - whole
    assert change.item() == pytest.approx(4.2e-7, rel=0.02)  # the 1e-6 beside the deviation


def resized(image, height, width):
    """Bilinear, corners not aligned: nested lists (H, W) → (height, width)."""

    def positions(size, wanted):
        for k in range(wanted):
            x = max((k + 0.5) * size / wanted - 0.5, 0.0)
            low = min(int(x), size - 1)
            yield low, min(low + 1, size - 1), x - low

    return [
        [
            (1 - fy) * ((1 - fx) * image[y0][x0] + fx * image[y0][x1])
            + fy * ((1 - fx) * image[y1][x0] + fx * image[y1][x1])
            for x0, x1, fx in positions(len(image[0]), width)
        ]
        for y0, y1, fy in positions(len(image), height)
    ]


def standardised(maps, channel, size):
    values = [v for image in maps for row in resized(image[channel], *size) for v in row]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return [(v - mean) / (math.sqrt(variance) + 1e-6) for v in values]


def reference(student, teacher, resize):
    """The definition, value by value."""
    size = tuple((teacher if resize == "student" else student).shape[-2:])
    total, count = 0.0, 0
    for channel in range(student.shape[1]):
        pair = (standardised(x.tolist(), channel, size) for x in (student, teacher))
        for s, t in zip(*pair, strict=True):
            total, count = total + (s - t) ** 2, count + 1
    return total / count / 2


side = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 3),
    sizes=st.tuples(side, side, side, side),
    equal=st.booleans(),
    resize=st.sampled_from(["student", "teacher"]),
    offset=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_reference(images, channels, sizes, equal, resize, offset, seed):
    other = sizes[:2] if equal else sizes[2:]
    student = offset + random(images, channels, *sizes[:2], seed=seed)
    teacher = 3 * random(images, channels, *other, seed=seed + 100)
    value, gradient = with_gradient(student, teacher, resize)
    # A constant map may be resized to one that varies by 1e-14, which 1e-6 in the divisor enlarges.
    assert value.item() == pytest.approx(reference(student, teacher, resize), rel=1e-9, abs=1e-7)
    assert gradient.isfinite().all()


def test_only_one_dimension_may_differ():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 7, seed=1)
    for resize in ("student", "teacher"):
        wanted = reference(student, teacher, resize)
        assert pearson_term(student, teacher, resize).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("resize", ["student", "teacher"])
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 3, 4), (2, 3, 3, 4)),
        ((1, 2, 1, 3), (1, 2, 1, 3)),  # one row
        ((2, 2, 2, 3), (2, 2, 5, 4)),
        ((1, 2, 5, 4), (1, 2, 2, 3)),
        ((3, 2, 1, 1), (3, 2, 1, 1)),  # one cell in each of three images
    ],
)
def test_gradcheck(shapes, resize):
    student, teacher = random(*shapes[0]).requires_grad_(), random(*shapes[1], seed=1)
    assert torch.autograd.gradcheck(lambda x: 3 * pearson_term(x, teacher, resize), student)


def test_it_is_one_minus_the_pearson_correlation():
    student, teacher = random(2, 5, 6, 7) * 4 + 1, random(2, 5, 6, 7, seed=1)
    student += torch.linspace(-3, 3, 5)[:, None, None] * teacher
    count = 2 * 6 * 7
    rows = [x.transpose(0, 1).reshape(5, count).numpy() for x in (student, teacher)]
    correlations = np.array([np.corrcoef(s, t)[0, 1] for s, t in zip(*rows, strict=True)])
    assert correlations.min() < -0.4 and correlations.max() > 0.4
    wanted = (count - 1) / count * (1 - correlations).mean()
    assert pearson_term(student, teacher).item() == pytest.approx(wanted, abs=5e-6)
    # and the gradient is that of the correlation, which is orthogonal to scale and offset
    gradient = with_gradient(student, teacher)[1]
    assert gradient.sum(dim=(0, 2, 3)).abs().max() < 1e-15
    centred = student - student.mean(dim=(0, 2, 3), keepdim=True)
    assert (gradient * centred).sum(dim=(0, 2, 3)).abs().max() < 1e-6


def test_scale_and_offset_of_a_channel_do_not_count_and_the_range_is_0_to_2():
    student, teacher = random(2, 3, 5, 6), random(2, 3, 5, 6, seed=1)
    scale = torch.tensor([0.5, 7.0, 300.0])[:, None, None]
    offset = torch.tensor([-9.0, 0.0, 50.0])[:, None, None]
    wanted = pearson_term(student, teacher).item()
    for own, other in ((student * scale + offset, teacher), (student, teacher * scale + offset)):
        assert pearson_term(own, other).item() == pytest.approx(wanted, abs=5e-6)
    assert pearson_term(teacher * scale + offset, teacher).item() < 1e-11
    opposite = pearson_term(-teacher * scale + offset, teacher).item()
    assert opposite == pytest.approx(2 * 59 / 60, abs=1e-5)


def test_by_hand():
    # Deviations sqrt(2): standardised to -+0.707107 and +-0.707107, so 1.414214 apart.
    student = torch.tensor([1.0, 3.0]).double().view(1, 1, 1, 2)
    teacher = torch.tensor([8.0, 6.0]).double().view(1, 1, 1, 2)
    assert pearson_term(student, teacher).item() == pytest.approx(1.0, abs=2e-6)
    assert pearson_term(student, student).item() == 0


def composed(student, teacher):
    """The definition by autograd, with PyTorch's gradient of a deviation of 0, which is 0."""
    maps = [
        (x - x.mean(dim=(0, 2, 3), keepdim=True))
        / (x.transpose(0, 1).flatten(1).std(dim=1)[:, None, None] + 1e-6)
        for x in (student, teacher)
    ]
    return (maps[0] - maps[1]).square().mean() / 2


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e5])
def test_value_and_gradient_equal_the_definitions_whatever_the_scale(scale):
    student, teacher = scale * random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    value, gradient = with_gradient(student, teacher)
    student.requires_grad_()
    wanted = composed(student, teacher)
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    error = (gradient - student.grad).abs().max()
    assert error < 1e-9 * student.grad.abs().max()


def test_a_constant_student_channel_counts_a_half_and_gets_no_gradient():
    student, teacher = random(2, 4, 5, 6), random(2, 4, 5, 6, seed=1)
    others = [0, 2, 3]
    alone, gradient_alone = with_gradient(student[:, others], teacher[:, others])
    student[:, 1] = 3.3
    value, gradient = with_gradient(student, teacher)
    expected = (3 * alone + 0.5 * 59 / 60) / 4
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert gradient[:, 1].abs().max() == 0
    torch.testing.assert_close(gradient[:, others], gradient_alone * 3 / 4, rtol=1e-12, atol=0)
    # What is left out here: the value is the authors', their gradient of that channel is huge.
    student.requires_grad_()
    authors = composed(student, teacher)
    authors.backward()
    assert value.item() == pytest.approx(authors.item(), rel=1e-12)
    assert student.grad[:, 1].abs().max() > 1e5 * gradient.abs().max()
    torch.testing.assert_close(gradient[:, others], student.grad[:, others], rtol=1e-9, atol=0)


def test_a_constant_teacher_channel_gives_next_to_no_gradient():
    student, teacher = random(2, 2, 5, 6), random(2, 2, 5, 6, seed=1)
    teacher[:, 0] = -7.0
    value, gradient = with_gradient(student, teacher)
    student.requires_grad_()
    wanted = composed(student, teacher)
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-6, atol=1e-14)
    assert 0 < gradient[:, 0].abs().max() < 1e-5 * gradient[:, 1].abs().max()
    student = torch.full((2, 1, 5, 6), 4.0).double()
    assert with_gradient(student, teacher[:, :1])[0].item() == 0  # two constant ones


@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_a_channel_is_constant_although_resizing_rounds(resize):
    # Bilinear weights do not sum to 1 exactly, so 100.3 becomes 100.3 -+ 8e-6.
    constant = torch.full((3, 2, 7, 5), 100.3)
    other = random(3, 2, 14, 9, dtype=torch.float32)
    for value, gradient in (
        with_gradient(constant, other, resize),
        with_gradient(other, constant, resize),
    ):
        assert value.item() == pytest.approx(0.5, abs=0.01)
        assert gradient.abs().max() < 1e-6


def test_one_value_in_all_is_constant():
    value, gradient = with_gradient(random(1, 3, 1, 1), random(1, 3, 1, 1, seed=1))
    assert value.item() == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision(dtype):
    # 134,400 values in a channel around 30: their sum overflows float16.
    student = (30 + 4 * random(2, 3, 200, 336, dtype=torch.float32)).to(dtype)
    teacher = (random(2, 3, 200, 336, seed=1, dtype=torch.float32) * 4).to(dtype)
    teacher = (teacher + student / 8).to(dtype)
    own = student.clone().requires_grad_()
    value = pearson_term(own, teacher)
    (value * 65536).backward()
    exact, gradient = with_gradient(student.double(), teacher.double())
    assert (value.dtype, own.grad.dtype) == (torch.float32, dtype)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    error = (own.grad.double() / 65536 - gradient).abs().max()
    assert error < 0.01 * gradient.abs().max()
    mixed = pearson_term(student.float(), teacher)
    assert mixed.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (12, 16)])
def test_maps_are_not_kept_for_the_backward_pass(size):
    student = random(2, 4, 6, 8, dtype=torch.float32).half().requires_grad_()
    teacher = random(2, 4, *size, seed=1, dtype=torch.float32).half()
    kept = []
    given = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pearson_term(student, teacher)
    own = [x for x in kept if x.untyped_storage().data_ptr() not in given]
    assert len(own) < len(kept) and all(x.numel() == 4 for x in own)


def test_teacher_gets_no_gradient_and_unequal_maps_are_refused():
    teacher = random(1, 2, 3, 3).requires_grad_()
    pearson_term(random(1, 2, 3, 3, seed=1).requires_grad_(), teacher).backward()
    assert teacher.grad is None
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\).*\(1, 4, 3, 3\) need the same number"):
        pearson_term(teacher, torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="at least one"):
        pearson_term(torch.zeros(0, 4, 3, 3), torch.zeros(0, 4, 3, 3))


def test_keys_and_their_checks():
    cfg = get_fgd_cfg()
    node = cfg.MODEL.DISTILLER.PKD
    assert dict(node) == {"PEARSON_WEIGHT": 10.0, "PAIRING": "stride", "RESIZE": "student"}
    own = PKD.from_config(cfg, [Level("p3", 8, 8, "p2")])
    assert (own.weights, own.resize, own.loss_names) == (
        {"pearson": 10.0},
        "student",
        ("loss_pkd_pearson",),
    )
    assert not list(own.parameters())
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.update(METHOD="PKD", STUDENT="RetinaNet")
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "teacher.pth"
    cfg.MODEL.DEVICE = "cpu"
    check_config(cfg)
    for key, value in (("PAIRING", "order"), ("RESIZE", "both")):
        wrong = cfg.clone()
        wrong.MODEL.DISTILLER.PKD[key] = value
        with pytest.raises(UserError, match=rf"PKD\.{key}: '{value}' is neither '\w+' nor '\w+'"):
            check_config(wrong)
    with pytest.raises(UserError, match="(?s)student's p4 8, the teacher's c4 16; p5 8.*OUT_CHANN"):
        PKD.from_config(
            cfg, [Level("p3", 8, 8, "c3"), Level("p4", 8, 16, "c4"), Level("p5", 8, 9, "c5")]
        )


# Weight, pairing, levels, iterations of the published configs.
PUBLISHED = {
    "pkd_frcnn": (6.0, "stride", ["p2", "p3", "p4", "p5"], 180000),
    "pkd_frcnn_vit": (6.0, "stride", ["p2", "p3", "p4", "p5"], 180000),
    "pkd_retinanet": (10.0, "stride", ["p3", "p4", "p5", "p6"], 180000),
    "pkd_retinanet_fcos": (10.0, "stride", ["p3", "p4", "p5", "p6"], 90000),
    "pkd_retinanet_swin": (6.0, "index", ["p3", "p4", "p5", "p6"], 180000),
    "pkd_reppoints": (10.0, "stride", ["p3", "p4", "p5", "p6"], 180000),
}


def test_configs_state_the_published_settings():
    assert {path.stem for path in CONFIGS.glob("pkd_*.yaml")} == set(PUBLISHED)
    for name, (weight, pairing, levels, iterations) in PUBLISHED.items():
        cfg = load_config(str(CONFIGS / f"{name}.yaml"))
        node = cfg.MODEL.DISTILLER
        assert list(node.PKD.values()) == [weight, pairing, "student"]
        assert (node.INHERIT, cfg.SOLVER.CLIP_GRADIENTS.ENABLED) == (False, False)
        assert PKD.choose_levels(head_levels(cfg), []) == levels
        assert cfg.SOLVER.MAX_ITER == iterations
        assert (node.FEATURES == "output") == (name == "pkd_reppoints")
    cfg = load_config(str(CONFIGS / "pkd_retinanet_fcos.yaml"))
    teacher = load_config(str(CONFIGS / "teacher_fcos.yaml"))
    node = cfg.MODEL.DISTILLER.TEACHER
    assert (node.CONFIG_FILE, node.WEIGHTS) == ("", f"{teacher.OUTPUT_DIR}/model_final.pth")


def test_weight_0_and_the_table():
    maps = {f"p{i}": random(2, 3, 4 - i, 5, seed=i).requires_grad_() for i in range(2)}
    taught = {f"p{i}": random(2, 3, 4, 5, seed=i + 9) for i in range(2)}
    given = batch(maps, {**taught, "p9": torch.full((1,), torch.nan)})
    table = method(3, weight=2.0, count=2).table(given)
    assert list(table) == ["p0", "p1"]
    for name, terms in table.items():
        (term,) = terms.items()
        assert term[0] == "pkd_pearson"
        torch.testing.assert_close(term[1], 2 * pearson_term(maps[name], taught[name]))
    for resize in ("student", "teacher"):
        found = method(3, resize).table(batch({"p0": maps["p1"]}, taught))["p0"]["pkd_pearson"]
        assert found.item() == pearson_term(maps["p1"], taught["p0"], resize).item()
    zero = over_levels(method(3, weight=0.0).table(given))["pkd_pearson"]
    zero.backward()
    assert zero.item() == 0 and maps["p0"].grad.abs().max() == 0


DENSE = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(3, 8)}
R_CNN = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}


def pairs(tiny_cfg, arch, student, teacher, pairing):
    cfg = tiny_cfg(arch)
    cfg.MODEL.DISTILLER.update(METHOD="PKD", STUDENT=arch)
    cfg.MODEL.DISTILLER.PKD.PAIRING = pairing
    (levels,) = plan_levels(cfg, Outputs(student, {}), Outputs(teacher, {})).values()
    return [f"{x.name}<-{x.teacher_name}" for x in levels]


@pytest.mark.parametrize("pairing", ["stride", "index"])
def test_the_finest_four_levels_are_distilled(tiny_cfg, pairing):
    dense = pairs(tiny_cfg, "RetinaNet", DENSE, DENSE, pairing)
    assert dense == ["p3<-p3", "p4<-p4", "p5<-p5", "p6<-p6"]
    r_cnn = pairs(tiny_cfg, "GeneralizedRCNN", R_CNN, R_CNN, pairing)
    assert r_cnn == ["p2<-p2", "p3<-p3", "p4<-p4", "p5<-p5"]


def test_pairing_across_families(tiny_cfg):
    index = pairs(tiny_cfg, "RetinaNet", DENSE, R_CNN, "index")
    assert index == ["p3<-p2", "p4<-p3", "p5<-p4", "p6<-p5"]
    stride = pairs(tiny_cfg, "RetinaNet", DENSE, R_CNN, "stride")
    assert stride == ["p3<-p3", "p4<-p4", "p5<-p5", "p6<-p6"]


def step(cfg, batch):
    torch.manual_seed(0)
    model = build_model(cfg)
    seen = []
    model.watch = seen.append
    with EventStorage():
        losses = model(batch)
    losses["loss_pkd_pearson"].backward()
    return model, losses, seen[0]


@pytest.mark.parametrize("pairing, partner, factor", [("stride", "p3", 1), ("index", "p2", 2)])
def test_a_retinanet_learns_from_an_r_cnn(pairing, partner, factor, tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg("RetinaNet"), tmp_path, "GeneralizedRCNN", channels=16)
    cfg.MODEL.DISTILLER.METHOD = "PKD"
    cfg.MODEL.DISTILLER.PKD.PAIRING = pairing
    inputs = make_batch()
    inputs[1]["instances"] = inputs[1]["instances"][:0]  # boxes play no part
    model, losses, seen = step(cfg, inputs)
    assert all(x.isfinite() for x in losses.values()) and 0 < losses["loss_pkd_pearson"] <= 80
    assert list(model.table) == ["p3", "p4", "p5", "p6"]
    assert model.teacher.sources["p3"].output == partner
    ratio = [x / y for x, y in zip(seen.teacher["p3"].shape, seen.student["p3"].shape)]
    assert ratio == [1, 1, factor, factor]
    body = next(model.student.backbone.bottom_up.parameters())
    assert body.grad.abs().sum() > 0
    assert f"pairing {pairing}" in model.describe()


def test_a_teacher_of_other_channels_is_refused_before_training(tiny_cfg, tmp_path):
    cfg = distilled(tiny_cfg("RetinaNet"), tmp_path, channels=24)
    cfg.MODEL.DISTILLER.METHOD = "PKD"
    with pytest.raises(UserError, match="equal numbers of them: the student's p3 16, the teacher"):
        build_model(cfg)
