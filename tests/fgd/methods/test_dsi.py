import math

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgd.config import check_config, get_fgd_cfg
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.dsi import DSI, cosine_distance, to_grid
from tests.conftest import make_tiny_cfg
from tests.fgd.training import distilled, taught_by_timm

from .batches import make_batch

# Literally from the equations, in Python loops over numbers of float64.


def literal_resize(teacher, height, width):
    """(D, h, w) → (D, height, width): each value from the four around its centre's place."""
    depth, rows, columns = teacher.shape
    found = np.zeros((depth, height, width))

    def place(index, cells, size):
        middle = max((index + 0.5) * size / cells - 0.5, 0.0)
        first = int(middle)
        return first, min(first + 1, size - 1), middle - first

    for i in range(height):
        for j in range(width):
            top, bottom, down = place(i, height, rows)
            left, right, across = place(j, width, columns)
            for d in range(depth):
                found[d, i, j] = (1 - down) * (
                    (1 - across) * teacher[d, top, left] + across * teacher[d, top, right]
                ) + down * (
                    (1 - across) * teacher[d, bottom, left] + across * teacher[d, bottom, right]
                )
    return found


def literal(student, teacher, matrix, bias):
    """Value, and the gradients of student map, matrix and bias."""
    images, channels, height, width = student.shape
    count = images * height * width
    value, grads = 0.0, [np.zeros_like(x) for x in (student, matrix, bias)]
    for n in range(images):
        wanted = literal_resize(teacher[n], height, width)
        for i in range(height):
            for j in range(width):
                t = [float(x) for x in wanted[:, i, j]]
                s = [
                    float(bias[d])
                    + sum(matrix[d, c] * student[n, c, i, j] for c in range(channels))
                    for d in range(len(t))
                ]
                dot = sum(a * b for a, b in zip(s, t))
                own, other = math.sqrt(sum(a * a for a in s)), math.sqrt(sum(b * b for b in t))
                value += (1 - dot / (own * other)) / count
                for d in range(len(t)):
                    slope = -(t[d] / (own * other) - dot * s[d] / (own**3 * other)) / count
                    grads[2][d] += slope
                    for c in range(channels):
                        grads[1][d, c] += slope * student[n, c, i, j]
                        grads[0][n, c, i, j] += slope * matrix[d, c]
    return value, grads


def run(student, teacher, method):
    """The weighted term of a batch of one level."""
    size = (student.shape[2] * 32, student.shape[3] * 32)
    boxes = [torch.zeros(0, 4)] * len(student)  # it asks for none
    return method(make_batch({"res5": student}, {"res5": teacher}, boxes, size))["res5"]["cosine"]


def make(channels, depth, dtype=torch.float64, weight=1.0):
    return DSI([Level("res5", channels, depth, "tokens", 32)], {"cosine": weight}).to(dtype)


SHAPES = [  # N, C, D, student's grid, teacher's grid
    (1, 1, 2, (1, 1), (1, 1)),
    (2, 3, 4, (2, 3), (2, 3)),
    (2, 3, 4, (2, 3), (4, 6)),
    (1, 4, 2, (1, 5), (3, 7)),
    (2, 2, 5, (4, 3), (2, 2)),
    (1, 2, 3, (5, 4), (1, 1)),
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_equal_the_literal_equations(shape, dtype, tolerance):
    images, channels, depth, grid, theirs = shape
    torch.manual_seed(sum(grid))
    method = make(channels, depth, dtype, weight=2.5)
    student = torch.randn(images, channels, *grid, dtype=dtype, requires_grad=True)
    teacher = torch.randn(images, depth, *theirs, dtype=dtype, requires_grad=True)
    conv = method.project["res5"]
    loss = run(student, teacher, method)
    loss.backward()
    numbers = [x.detach().double().numpy() for x in (student, teacher, conv.weight, conv.bias)]
    value, grads = literal(*numbers[:2], numbers[2][:, :, 0, 0], numbers[3])
    found = [student.grad, conv.weight.grad[:, :, 0, 0], conv.bias.grad]
    assert loss.dtype == dtype and teacher.grad is None
    for own, wanted in zip([loss.detach(), *found], [2.5 * value, *(2.5 * x for x in grads)]):
        scale = max(np.abs(wanted).max(), 1e-6)
        assert np.abs(own.double().numpy() - wanted).max() <= tolerance * scale


def test_a_direction_in_one_dimension_cannot_turn():
    method, student = make(3, 1), torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    loss = run(student, torch.ones(1, 1, 1, 1, dtype=torch.float64), method)
    loss.backward()
    assert min(loss.item(), 2 - loss.item()) < 1e-15 and student.grad.abs().max() < 1e-14


def test_gradcheck():
    torch.manual_seed(1)
    method = make(2, 3)
    student = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: run(x, teacher, method), student)


def test_by_hand():
    student = torch.tensor([[[[3.0, 0.0]], [[4.0, 2.0]]]])  # cells (3, 4) and (0, 2)
    teacher = torch.tensor([[[[4.0, 5.0]], [[3.0, 0.0]]]])  # (4, 3) and (5, 0)
    found = cosine_distance(student, teacher)
    torch.testing.assert_close(found, torch.tensor([[[1 - 24 / 25, 1.0]]]))
    fine = torch.tensor([[[[1.0, 3.0, 0.0, 2.0], [5.0, 7.0, 4.0, 6.0]]]])
    assert torch.equal(to_grid(fine, torch.zeros(1, 9, 1, 2)), torch.tensor([[[[4.0, 3.0]]]]))


def test_the_same_opposite_and_scaled_maps():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    assert cosine_distance(x, x).abs().max() < 1e-14
    assert (cosine_distance(x, -x) - 2).abs().max() < 1e-14
    y = torch.randn_like(x)
    wanted = cosine_distance(x, y)
    for scale in (1e-6, 3.0, 1e6):
        for own, other in ((scale * x, y), (x, scale * y)):
            torch.testing.assert_close(cosine_distance(own, other), wanted, rtol=1e-12, atol=1e-12)
    assert wanted.min() >= 0 and wanted.max() <= 2


def test_a_cell_of_zeros_has_no_direction_and_no_gradient():
    x = torch.randn(1, 3, 1, 3)
    x[..., 0] = 0
    x.requires_grad_()
    y = torch.randn(1, 3, 1, 3)
    y[..., 1] = 0
    found = cosine_distance(x, y)
    found.sum().backward()
    assert found[0, 0, :2].tolist() == [1, 1] and not x.grad[..., :2].any()
    assert x.grad[..., 2].abs().sum() > 0 and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_summed_in_float32(dtype):
    torch.manual_seed(2)
    method = make(8, 16, torch.float32)
    student, teacher = torch.randn(2, 8, 3, 5, dtype=dtype), torch.randn(2, 16, 6, 10, dtype=dtype)
    teacher *= 100  # lengths whose squares float16 cannot hold
    student.requires_grad_()
    loss = run(student, teacher, method)
    loss.backward()
    exact = run(student.detach().double(), teacher.double(), method.double())
    assert loss.dtype == torch.float32 and student.grad.isfinite().all()
    assert abs(loss.item() - exact.item()) < 1e-5


def test_every_cell_counts_that_of_padding_too():
    """The mean over a padded batch is that of its cells, whatever the images' own sizes."""
    method = make(2, 2)
    student, teacher = torch.randn(2, 2, 2, 2).double(), torch.randn(2, 2, 2, 2).double()
    boxes = [torch.zeros(0, 4)] * 2
    sizes = [(64, 64), (32, 32)]
    maps = {"res5": student}, {"res5": teacher}
    padded = method(make_batch(*maps, boxes, (64, 64), image_sizes=sizes))["res5"]["cosine"]
    cells = cosine_distance(method.project["res5"](student), teacher)
    assert cells.numel() == 8 and padded.item() == pytest.approx(cells.mean().item(), rel=1e-12)


def test_levels_are_the_deepest_stage_unless_said():
    assert DSI.choose_levels(["p3", "p4"], ["res4", "res5"]) == ["res5"]
    assert DSI.choose_levels(["p3", "p4"], []) == ["p4"]


def test_its_key_and_what_is_refused(tmp_path):
    assert dict(get_fgd_cfg().MODEL.DISTILLER.DSI) == {"COSINE_WEIGHT": 5.0}
    cfg = taught(tmp_path)
    check_config(cfg)
    cfg.MODEL.DISTILLER.DSI.COSINE_WEIGHT = -1.0
    with pytest.raises(UserError, match="DSI.COSINE_WEIGHT: -1.0 is not a finite weight >= 0"):
        check_config(cfg)


def taught(folder, arch="RetinaNet"):
    """A tiny student under a random vision transformer."""
    cfg = taught_by_timm(make_tiny_cfg(arch), folder)
    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.LEVELS = "DSI", []
    return cfg


def step(cfg, batch):
    torch.manual_seed(1)
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(batch)
    losses["loss_dsi_cosine"].backward()
    return model, losses["loss_dsi_cosine"]


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
@pytest.mark.parametrize("stride", [0, 32])
def test_a_vision_transformer_teaches_the_deepest_stage(arch, stride, tmp_path, make_batch):
    cfg = taught(tmp_path, arch)
    cfg.MODEL.DISTILLER.TEACHER.TIMM_STRIDE = stride
    batch = make_batch()
    model, loss = step(cfg, batch)
    (level,) = model.distillation.distilled
    assert level[2:] == (64, "tokens", 32, True) and level.name == "res5"
    assert 0 < loss / 5 < 2 and model.table["res5"]["dsi_cosine"] == loss
    body = model.student.backbone.bottom_up
    assert all(p.grad is not None and p.grad.any() for p in model.distillation.parameters())
    assert sum(p.grad.abs().sum() for p in body.parameters()) > 0
    neck = [p for n, p in model.student.backbone.named_parameters() if "bottom_up" not in n]
    assert neck and all(p.grad is None or not p.grad.any() for p in neck)
    for x in batch:
        x["instances"] = x["instances"][:0]
    assert step(cfg, batch)[1].item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_detector_teaches_too_and_one_map_several_levels(tmp_path, make_batch):
    cfg = distilled(make_tiny_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "DSI"
    model, loss = step(cfg, make_batch())
    assert model.distillation.distilled[0].teacher_name == "res5" and 0 < loss < 10
    cfg = taught(tmp_path)
    cfg.MODEL.DISTILLER.LEVELS = ["p3", "p5", "res4"]
    model, loss = step(cfg, make_batch())
    assert {x.name: x.teacher_name for x in model.distillation.distilled} == dict.fromkeys(
        ("p3", "p5", "res4"), "tokens"
    )
    assert loss.item() == pytest.approx(sum(x["dsi_cosine"].item() for x in model.table.values()))


def test_the_picture_is_the_distance_of_each_cell(tmp_path, make_batch):
    model = build_model(taught(tmp_path)).eval()
    batch = make_batch()
    seen = model.batch(model.read_student(batch), batch)
    own = model.distillation.pictures(seen, 1)["res5"]
    assert set(own) == {"teacher response", "student response", "cosine distance"}
    wanted = model.distillation.distances(seen, "res5")
    assert np.array_equal(own["cosine distance"].values, wanted[1].detach().numpy())
