import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.config import check_config
from fgd.errors import UserError
from fgd.methods.batch import HeadLevel, Heads, Level
from fgd.methods.cwd import CWD, channel_divergence
from tests.fgd.methods.batches import make_batch as batch_of
from tests.fgd.training import distilled

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "cwd").glob("*.npz"))


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(actual, wanted, tolerance):
    largest = max(float(wanted.abs().max()), 1e-6)
    assert float((actual - wanted).abs().max()) <= tolerance * largest


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_value_and_gradient(path, dtype, tolerance):
    content = np.load(path)
    student, teacher = (torch.from_numpy(content[k]).to(dtype) for k in ("student", "teacher"))
    student.requires_grad_()
    value = channel_divergence(student, teacher, float(content["tau"]))
    value = float(content["loss_weight"]) * value
    value.backward()
    close(value.detach(), torch.from_numpy(content["loss"]), tolerance)
    close(student.grad, torch.from_numpy(content["grad_student"]), tolerance)


def test_there_are_four_golden_cases():
    assert len(GOLDEN) == 4


def test_golden_constants():
    i = torch.arange(2 * 4 * 5 * 6, dtype=torch.float64)
    student = (torch.sin(0.37 * i + 1.0) + 0.1).view(2, 4, 5, 6)
    teacher = (torch.sin(0.37 * i + 2.0) + 0.2).view(2, 4, 5, 6)
    value = channel_divergence(student, teacher).item()
    assert value == pytest.approx(0.19915170263090942, rel=1e-13)
    value = 10 * channel_divergence(student, teacher, 4.0).item()
    assert value == pytest.approx(2.221570030040007, rel=1e-13)


def literal(student, teacher, temperature):
    """The equation, cell by cell."""
    total, (n, channels) = 0.0, student.shape[:2]
    for image in range(n):
        for c in range(channels):
            sides = []
            for x in (student, teacher):
                cells = [v / temperature for row in x[image, c].tolist() for v in row]
                total_mass = math.fsum(math.exp(v) for v in cells)
                sides.append([math.exp(v) / total_mass for v in cells])
            total += math.fsum(p * math.log(p / q) for q, p in zip(*sides, strict=True))
    return total * temperature**2 / (channels * n)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 4, 5, 5)]),
    temperature=st.floats(0.3, 6.0),
    scale=st.floats(0.1, 5.0),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_reference(shape, temperature, scale, seed):
    student, teacher = (scale * random(*shape, seed=seed + k) for k in (0, 100))
    found = channel_divergence(student, teacher, temperature).item()
    assert found == pytest.approx(literal(student, teacher, temperature), rel=1e-9, abs=1e-13)


def test_gradcheck():
    student = random(2, 3, 3, 4).requires_grad_()
    teacher = random(2, 3, 3, 4, seed=1)
    for temperature in (1.0, 2.5):
        loss = lambda x: channel_divergence(x, teacher, temperature)  # noqa: B023, E731
        assert torch.autograd.gradcheck(loss, student)


def test_a_case_by_hand():
    # One channel of two cells: p = (3/4, 1/4), q = (1/2, 1/2).
    teacher = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    student = torch.zeros(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    value = channel_divergence(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-14)
    torch.testing.assert_close(student.grad.flatten(), torch.tensor([-0.25, 0.25]).double())


def test_maps_of_one_cell_and_equal_maps_give_zero():
    student = random(3, 5, 1, 1).requires_grad_()
    value = channel_divergence(student, random(3, 5, 1, 1, seed=1))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0
    student = random(2, 4, 3, 5).requires_grad_()
    value = channel_divergence(student, student)
    value.backward()  # into the student's side alone
    assert value.item() == 0 and student.grad.abs().max() == 0


def test_a_constant_added_to_a_channel_changes_nothing():
    student, teacher = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1)
    offset = 5 * random(2, 4, 1, 1, seed=2)
    wanted = channel_divergence(student, teacher, 2.0)
    for changed in ((student + offset, teacher), (student, teacher + offset)):
        torch.testing.assert_close(channel_divergence(*changed, 2.0), wanted, rtol=1e-12, atol=0)
    assert channel_divergence(student + offset, student).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_summed_in_float32(dtype):
    # 16,800 cells: a softmax of float16 over them would be mostly 0.
    student = (3 * random(1, 16, 100, 168)).to(dtype).requires_grad_()
    teacher = (3 * random(1, 16, 100, 168, seed=1)).to(dtype)
    value = channel_divergence(student, teacher)
    exact = channel_divergence(student.detach().double(), teacher.double())
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=1e-4)
    (value * 1024).backward()
    assert student.grad.dtype == dtype and student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


def test_only_the_gradient_is_held_until_the_backward_pass():
    held = []
    student, teacher = random(2, 4, 8, 8).requires_grad_(), random(2, 4, 8, 8, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        value = channel_divergence(student, teacher)
    value.backward()
    assert [x.shape for x in held] == [student.shape]
    with torch.no_grad():
        assert channel_divergence(student, teacher) == value


def test_extremely_peaked_maps_stay_finite():
    student = (1e4 * random(1, 3, 6, 6, dtype=torch.float32)).requires_grad_()
    value = channel_divergence(student, 1e4 * random(1, 3, 6, 6, seed=1, dtype=torch.float32))
    value.backward()
    assert value.isfinite() and value > 0 and student.grad.isfinite().all()


def test_large_maps_give_no_denormal_numbers_and_the_exact_value():
    """Probabilities of 1e-30 to 1e-300: value and gradient are those of float64 without a bound."""
    student, teacher = 30 * random(1, 4, 9, 9, seed=1), 30 * random(1, 4, 9, 9, seed=2)
    small = student.float().requires_grad_()
    value = channel_divergence(small, teacher.float())
    value.backward()
    exact = student.requires_grad_()
    log_q, log_p = (x.flatten(2).log_softmax(2) for x in (exact, teacher))
    wanted = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / 4
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 10
    torch.testing.assert_close(small.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    sizes = small.grad.abs()[small.grad != 0]
    assert len(sizes) > 50 and sizes.min() > torch.finfo(torch.float32).tiny


def test_levels_of_unequal_channels_are_aligned():
    levels = [Level("p3", 3, 5), Level("p4", 4, 4)]
    method = CWD(levels, {"divergence": 2.0}, 1.5)
    assert {k: x.weight.shape for k, x in method.align.items()} == {"p3": (5, 3, 1, 1)}
    student = {"p3": random(2, 3, 4, 5), "p4": random(2, 4, 2, 3)}
    student = {k: x.float().requires_grad_() for k, x in student.items()}
    teacher = {"p3": random(2, 5, 4, 5, seed=1).float(), "p4": random(2, 4, 2, 3, seed=1).float()}
    boxes = [torch.zeros(0, 4)] * 2  # images without objects are as others
    table = method(batch_of(student, teacher, boxes, (32, 40)))
    aligned = method.align["p3"](student["p3"])
    for name, own in (("p3", aligned), ("p4", student["p4"])):
        torch.testing.assert_close(
            table[name]["divergence"], 2 * channel_divergence(own, teacher[name], 1.5)
        )
    sum(x["divergence"] for x in table.values()).backward()
    # The bias adds a constant to a channel: no gradient but for rounding.
    assert method.align["p3"].weight.grad.abs().sum() > 0
    assert method.align["p3"].bias.grad.abs().max() < 1e-6
    assert all(x.grad.abs().sum() > 0 for x in student.values())
    teacher["p4"] = teacher["p4"][..., :1]
    with pytest.raises(ValueError, match=r"CWD level 'p4': student map \(2, 4, 2, 3\) and teacher"):
        method(batch_of(student, teacher, boxes, (32, 40)))


def test_on_logits_every_class_of_every_anchor_is_a_channel():
    sides = [{k: random(2, 6, *size, seed=s) for k, size in SIZES.items()} for s in (0, 1)]
    views = [{k: HeadLevel(x, torch.empty(0)) for k, x in side.items()} for side in sides]
    rest = dict.fromkeys(("anchors", "targets", "cross", "decode"))
    heads = Heads(list(SIZES), "RetinaNet", 3, *views, **rest)
    batch = batch_of({}, {}, [torch.zeros(0, 4)] * 2, (32, 40), heads=heads)
    table = CWD([], {"divergence": 1.0}, on="logits")(batch)
    assert list(table) == list(SIZES)
    for name, terms in table.items():
        wanted = literal(sides[0][name], sides[1][name], 1.0)
        assert terms["divergence"].item() == pytest.approx(wanted, rel=1e-9)


SIZES = {"p3": (4, 5), "p4": (2, 3)}


@pytest.mark.parametrize("on", ["maps", "logits"])
@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_under_a_distiller(on, arch, tiny_cfg, make_batch, tmp_path):
    cfg = distilled(tiny_cfg(arch), tmp_path)
    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.CWD.ON = "CWD", on
    if on == "logits" and arch == "GeneralizedRCNN":
        with pytest.raises(UserError, match="CWD needs dense heads of one kind.*GeneralizedRCNN"):
            build_model(cfg)
        return
    model = build_model(cfg)
    batch = make_batch()
    batch[1]["instances"] = batch[1]["instances"][:0]
    with EventStorage():
        losses = model(batch)
    levels = range(2, 6) if arch == "GeneralizedRCNN" else range(3, 8)
    assert list(model.table) == [f"p{k}" for k in levels]
    loss = losses["loss_cwd_divergence"]
    assert loss.isfinite() and loss > 0
    loss.backward()
    assert next(model.student.backbone.bottom_up.parameters()).grad.abs().sum() > 0
    aligns = list(model.distillation.parameters())
    assert len(aligns) == (0 if on == "logits" else 2 * len(levels))
    assert all(p.grad is not None for p in aligns)
    if on == "logits":
        assert model.student.head.cls_score.weight.grad.abs().sum() > 0
        assert model.student.head.bbox_pred.weight.grad is None


def test_config(tiny_cfg, tmp_path):
    cfg = distilled(tiny_cfg(), tmp_path)
    node = cfg.MODEL.DISTILLER.CWD
    assert dict(node) == {"DIVERGENCE_WEIGHT": 10.0, "TEMPERATURE": 1.0, "ON": "maps"}
    cfg.MODEL.DISTILLER.METHOD = "CWD"
    check_config(cfg)
    assert CWD.needs_of(node) == {"teacher", "maps"}
    for key, value in (("ON", "boxes"), ("TEMPERATURE", 0.0), ("TEMPERATURE", math.inf)):
        wrong = cfg.clone()
        wrong.MODEL.DISTILLER.CWD[key] = value
        with pytest.raises(UserError, match=rf"CWD\.{key}: {value!r} is n"):
            check_config(wrong)
    node.update(ON="logits", TEMPERATURE=2.0, DIVERGENCE_WEIGHT=0.0)
    check_config(cfg)
    assert CWD.needs_of(node) == {"teacher", "heads"}
    method = CWD.from_config(cfg, [])
    assert (method.temperature, method.on, method.weights) == (2.0, "logits", {"divergence": 0.0})
