import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.config import check_config, get_fgd_cfg
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.boxes import cells_on_levels, object_mask
from fgd.methods.defeat import DeFeat, stage_mask
from fgd.methods.method import over_levels
from tests.fgd.methods.batches import make_batch
from tests.fgd.methods.fgd.test_method import WAITING, Recorder
from tests.fgd.methods.regions import batch_of, make_regions
from tests.fgd.methods.test_parts import reference_cells
from tests.fgd.training import distilled

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "defeat").glob("*.npz"))
WEIGHTS = {"object": 3.0, "background": 12.0, "stage_object": 2.0, "stage_background": 8.0}
WEIGHTS |= {"positive": 0.0, "negative": 0.0}
HEAD = {**WEIGHTS, "positive": 2.0, "negative": 3.0}


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def close(found, wanted, tolerance):
    """As the authors' figures are compared: relative to the largest of the array, at least 1e-6."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    bound = tolerance * wanted.abs().max().clamp(min=1e-6)
    assert (found.detach().double() - wanted).abs().max() <= bound


def load_golden(path, dtype):
    """The method, its batch, and our names of parameters with theirs."""
    content = np.load(path)
    tensor = {k: torch.from_numpy(content[k]).to(dtype) for k in content.files if k != "mode"}
    levels, student, teacher = [], {}, {}
    for name in (k for k in tensor if k.startswith(("student_", "backbone_student_"))):
        stage = name.startswith("backbone")
        student[name] = tensor[name].requires_grad_()
        teacher[name] = tensor[name.replace("student", "teacher")]
        stride = 0 if stage else int(content["strides"][int(name[-1])])
        levels.append(
            Level(name, student[name].shape[1], teacher[name].shape[1], "", stride, stage)
        )
    weights = {**WEIGHTS, **{k: float(content[f"weight_{k}"]) for k in ("object", "background")}}
    method = DeFeat(levels, weights, "neck-adapt" in str(content["mode"]), 1.0).to(dtype)
    names = {}
    for key in (k.removeprefix("param/") for k in content.files if k.startswith("param/")):
        kind, i, _, part = key.split(".")
        level = {"neck_adapt": "student", "bb_adapt": "backbone_student"}[kind]
        names[f"adapters.{level}_{i}.{part}"] = key
    method.load_state_dict({name: tensor[f"param/{key}"] for name, key in names.items()})
    boxes = list(tensor["boxes"].double().split(content["num_boxes"].tolist()))
    batch = make_batch(student, teacher, boxes, tuple(content["image_size"].tolist()))
    return content, method, batch, names


@pytest.mark.parametrize("path", [p for p in GOLDEN if "head" not in p.stem], ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_maps(path, dtype, tolerance):
    """Masks exactly; every part of the loss; gradients of every map and parameter."""
    content, method, batch, names = load_golden(path, dtype)
    for name, mask in method.masks(batch).items():
        if "backbone" not in name:
            assert np.array_equal(mask, content[f"mask_{name[-1]}"])
    if "backbone_mask" in content:
        size = content["backbone_mask"].shape[-2:]
        found = stage_mask(batch.boxes, batch.padded_size, size)
        assert np.array_equal(found, content["backbone_mask"])
    terms = over_levels(method(batch))
    assert len(terms) == (4 if "backbone" in path.stem else 2)
    for term, value in terms.items():
        close(value, content[f"loss_{term.replace('stage', 'backbone')}"], tolerance)
    total = sum(terms.values())
    close(total, content["loss"], tolerance)
    total.backward()
    for name, map_ in batch.student.items():
        close(map_.grad, content[f"grad_{name}"], tolerance)
    assert names.keys() == dict(method.named_parameters()).keys()
    for name, parameter in method.named_parameters():
        close(parameter.grad, content[f"grad/{names[name]}"], tolerance)


@pytest.mark.parametrize("path", [p for p in GOLDEN if "head" in p.stem], ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_logits(path, dtype, tolerance):
    """``decay`` is a factor on everything; MODEL.DISTILLER.SCHEDULE is ours."""
    content = np.load(path)
    student = torch.from_numpy(content["logits_student"]).to(dtype).requires_grad_()
    teacher = torch.from_numpy(content["logits_teacher"]).to(dtype)
    keys = {"positive": "weight_head", "negative": "weight_head_background"}
    weights = {**WEIGHTS, **{term: float(content[key]) for term, key in keys.items()}}
    method = DeFeat([], weights, True, float(content["temperature"]))
    labels = torch.from_numpy(content["labels"])
    assert labels.max() == int(content["num_classes"])  # what they take for background
    terms = method(batch_of(make_regions(student, teacher, labels)))["regions"]
    decay = float(content["decay"])
    close(decay * terms["positive"], content["loss_head"], tolerance)
    close(decay * terms["negative"], content["loss_head_background"], tolerance)
    (decay * sum(terms.values())).backward()
    close(student.grad, content["grad_logits_student"], tolerance)


def test_there_are_six_golden_cases():
    assert len(GOLDEN) == 6


LEVELS = [
    Level("p3", 2, 3, "p3", 8),
    Level("p4", 3, 3, "p4", 16),
    Level("res4", 2, 2, "res4", 16, stage=True),
]
SIZES = {"p3": (5, 7), "p4": (3, 4), "res4": (3, 4)}
PADDED = (40, 56)


def maps(seed=0, images=2):
    student, teacher = {}, {}
    for i, level in enumerate(LEVELS):
        size = SIZES[level.name]
        student[level.name] = random(images, level.student_channels, *size, seed=seed + i)
        teacher[level.name] = random(images, level.teacher_channels, *size, seed=seed + 50 + i)
    return student, teacher


def make(weights=WEIGHTS, adapt=True, seed=0):
    """With parameters away from their start near 0."""
    method = DeFeat(LEVELS, weights, adapt, 1.0).double()
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed + i, scale=0.3))
    return method


def convolve(x, weight, bias):
    """3x3, padding 1: (C, H, W) nested lists → the same of the output channels."""
    height, width = len(x[0]), len(x[0][0])
    found = [[[b] * width for _ in range(height)] for b in bias]
    for o in range(len(bias)):
        for r in range(height):
            for c in range(width):
                for i in range(len(x)):
                    for dr in range(3):
                        for dc in range(3):
                            at = r + dr - 1, c + dc - 1
                            if 0 <= at[0] < height and 0 <= at[1] < width:
                                found[o][r][c] += weight[o][i][dr][dc] * x[i][at[0]][at[1]]
    return found


def reference_mask(boxes, stride, size):
    marked = {cell for box in boxes for cell in reference_cells(box, stride, size)}
    return [[(c, r) in marked for c in range(size[1])] for r in range(size[0])]


def on_level(box, level, count):
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)) or x2 < x1 or y2 < y1:
        return False
    size = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / 56 + 1e-6
    return level == min(max(math.floor(math.log2(size)), 0), count - 1)


def reference(student, teacher, boxes, method):
    """Level → (L_obj, L_bg) by the equations, without weights and means over levels."""
    found = {}
    for index, level in enumerate(LEVELS):
        sums = [0.0, 0.0]
        count = [0, 0]
        conv = method.adapters[level.name]
        size = SIZES[level.name]
        for n, own in enumerate(boxes):
            x = convolve(student[level.name][n].tolist(), conv.weight.tolist(), conv.bias.tolist())
            if level.stage:
                fine = reference_mask(own, 4, (10, 14))
                mask = [
                    [fine[r * 10 // size[0]][c * 14 // size[1]] for c in range(size[1])]
                    for r in range(size[0])
                ]
                x = [[[max(0.0, v) for v in row] for row in channel] for channel in x]
            else:
                mask = reference_mask([b for b in own if on_level(b, index, 2)], level.stride, size)
            target = teacher[level.name][n].tolist()
            for k in range(len(x)):
                for r in range(size[0]):
                    for c in range(size[1]):
                        side = 0 if mask[r][c] else 1
                        sums[side] += (x[k][r][c] - target[k][r][c]) ** 2
                        count[side] += 1
        found[level.name] = [s / max(1, 2 * c) for s, c in zip(sums, count, strict=True)]
    return found


coordinate = st.floats(-12, 250, width=32) | st.sampled_from([math.nan, math.inf, 56.0, 40.0])


@settings(max_examples=12, deadline=None)
@given(
    boxes=st.lists(st.lists(st.tuples(*[coordinate] * 4), max_size=3), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_reference(boxes, seed):
    stacked = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    student, teacher = maps(seed, len(boxes))
    method = make(seed=seed)
    found = method(make_batch(student, teacher, stacked, PADDED))
    wanted = reference(student, teacher, [b.double().tolist() for b in stacked], method)
    assert list(found) == ["p3", "p4", "res4"]
    for name, (of_object, of_background) in wanted.items():
        prefix, count = ("stage_", 1) if name == "res4" else ("", 2)
        for term, value in ((f"{prefix}object", of_object), (f"{prefix}background", of_background)):
            assert found[name][term].item() == pytest.approx(
                WEIGHTS[term] * value / count, rel=1e-9
            )


BOXES = [torch.tensor([[3.0, 3, 30, 20], [0, 0, 55, 39]]), torch.tensor([[8.0, 8, 40, 39]])]


def test_gradcheck():
    method, (student, teacher) = make(HEAD), maps()
    names, keys = [n for n, _ in method.named_parameters()], list(student)
    regions = make_regions(random(4, 4), random(4, 4, seed=1), torch.tensor([0, 3, 2, 3]))

    def terms(logits, *inputs):
        own = dict(zip(keys, inputs[: len(keys)], strict=True))
        parameters = dict(zip(names, inputs[len(keys) :], strict=True))
        batch = make_batch(own, teacher, BOXES, PADDED)
        batch.regions = make_regions(logits, regions.teacher.logits, regions.labels)
        table = torch.func.functional_call(method, parameters, (batch,))
        return tuple(value for level in table.values() for value in level.values())

    student = [x.requires_grad_() for x in student.values()]
    logits = random(4, 4).requires_grad_()
    assert torch.autograd.gradcheck(terms, (logits, *student, *method.parameters()), fast_mode=True)


def test_equal_maps_give_zero_and_a_constant_difference_half_its_square():
    levels = [x._replace(student_channels=x.teacher_channels) for x in LEVELS]
    method = DeFeat(levels, WEIGHTS, False, 1.0).double()
    _, teacher = maps()
    student = {k: x.clone().requires_grad_() for k, x in teacher.items()}
    table = method(make_batch(student, teacher, BOXES, PADDED))
    total = sum(value for terms in table.values() for value in terms.values())
    gradients = torch.autograd.grad(total, [*student.values()])
    assert total == 0 and all(gradient.abs().max() == 0 for gradient in gradients)
    student = {k: x + 0.6 for k, x in teacher.items()}
    boxes = [BOXES[0], torch.tensor([[-100.0, -100, 30, 20]])]  # the second one is on p4
    terms = over_levels(method(make_batch(student, teacher, boxes, PADDED)))
    for term, value in terms.items():
        assert value.item() == pytest.approx(WEIGHTS[term] * 0.18)


def test_identity_adapters_give_zero_too():
    levels = [Level("p3", 3, 3, "p3", 8), Level("res4", 3, 3, "res4", 16, stage=True)]
    method = DeFeat(levels, WEIGHTS, True, 1.0).double()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
        for conv in method.adapters.values():
            conv.weight[range(3), range(3), 1, 1] = 1
    same = {"p3": random(2, 3, 5, 7), "res4": random(2, 3, 3, 4).relu()}
    terms = over_levels(method(make_batch(same, same, BOXES, PADDED)))
    assert [x.item() for x in terms.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize("empty", [(0,), (0, 1)], ids=["one", "all"])
def test_images_without_boxes_are_background(empty):
    boxes = [torch.zeros(0, 4) if n in empty else own for n, own in enumerate(BOXES)]
    student, teacher = maps()
    student = {k: x.requires_grad_() for k, x in student.items()}
    terms = over_levels(make()(make_batch(student, teacher, boxes, PADDED)))
    for prefix in ("", "stage_"):
        assert terms[f"{prefix}background"] > 0
        assert (terms[f"{prefix}object"] == 0) == (len(empty) == 2)
    if len(empty) == 2:
        gradient = torch.autograd.grad(terms["object"], student["p3"])[0]
        assert gradient.abs().max() == 0


def test_boxes_are_on_one_level_and_stages_see_all_of_them():
    boxes = [torch.tensor([[0.0, 0, 100, 100], [100, 0, 500, 400]])]
    sizes = [(64, 64), (32, 32), (16, 16)]
    cells = cells_on_levels(boxes, [8, 16, 32], sizes)
    fine, middle, coarse = map(object_mask, cells, sizes)
    assert fine.sum() == 12 * 12 and middle.sum() == 0 and coarse.sum() == 12 * 12
    assert stage_mask(boxes, (512, 512), (32, 32)).sum() > 24 * 24


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1)])
def test_odd_sizes(size):
    level = Level("p3", 2, 2, "p3", 8)
    method = DeFeat([level], WEIGHTS, True, 1.0).double()
    batch = make_batch(
        {"p3": random(1, 2, *size)}, {"p3": random(1, 2, *size, seed=1)}, BOXES[1:], PADDED
    )
    (terms,) = method(batch).values()
    assert all(value.isfinite() for value in terms.values()) and sum(terms.values()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_summed_in_float32(dtype):
    """200 x 336 cells with squares of 100 each: the sum is far beyond float16."""
    level = Level("p3", 8, 8, "p3", 8)
    student, teacher = ((10 * random(1, 8, 200, 336, seed=n)).to(dtype) for n in (0, 1))
    batch = make_batch({"p3": student.requires_grad_()}, {"p3": teacher}, BOXES[:1], (1600, 2688))
    method = DeFeat([level], WEIGHTS, False, 1.0)
    (terms,) = method(batch).values()
    double = make_batch({"p3": student.double()}, {"p3": teacher.double()}, BOXES[:1], (1600, 2688))
    (exact,) = method(double).values()
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-5)
    sum(terms.values()).backward()
    assert student.grad.isfinite().all()


def test_the_host_never_waits_for_a_value():
    method, (student, teacher) = make(HEAD), maps()
    batch = make_batch({k: x.requires_grad_() for k, x in student.items()}, teacher, BOXES, PADDED)
    batch.regions = make_regions(random(4, 4), random(4, 4, seed=1), torch.tensor([0, 3, 2, 3]))
    with Recorder() as recorder:
        sum(over_levels(method(batch)).values()).backward()
    assert "convolution" in recorder.seen and not recorder.seen & WAITING


def test_background_is_the_last_class_also_where_no_row_has_it():
    student, teacher = random(3, 5), random(3, 5, seed=1)
    method = DeFeat([], HEAD, True, 1.0)
    regions = make_regions(student, teacher, torch.tensor([0, 3, -1]))
    terms = method(batch_of(regions))["regions"]
    assert terms["negative"] == 0 and terms["positive"] > 0
    assert method(batch_of(make_regions(student, student, torch.tensor([0, 3, 4]))))["regions"] == {
        "positive": 0,
        "negative": 0,
    }


def test_pictures_show_the_cells_of_objects():
    student, teacher = maps()
    found = make().pictures(make_batch(student, teacher, BOXES, PADDED), 1)
    assert list(found) == ["p3", "p4", "res4"]
    assert found["p3"]["objects"].values.sum() == 4 * 3
    assert list(found["res4"]) == ["objects", "teacher response", "student response"]


def test_config():
    node = get_fgd_cfg().MODEL.DISTILLER.DEFEAT
    assert list(node.values()) == [4.0, 16.0, 4.0, 16.0, 0.0, 0.0, 1.0, True]
    assert DeFeat.needs_of(node) == {"teacher", "maps"}
    node.NEGATIVE_WEIGHT = 2.0
    assert DeFeat.needs_of(node) == {"teacher", "maps", "region_logits"}


def test_values_that_cannot_work_are_refused(tiny_cfg, tmp_path):
    cfg = distilled(tiny_cfg(), tmp_path)
    node = cfg.MODEL.DISTILLER
    node.METHOD, node.DEFEAT.ADAPT = "DeFeat", False
    with pytest.raises(UserError, match="ADAPT False needs .* student's 'p3' has 16, .*'p3' 24"):
        build_model(cfg)
    node.DEFEAT.TEMPERATURE = 0.0
    with pytest.raises(UserError, match="DEFEAT.TEMPERATURE: 0.0 is not above 0"):
        check_config(cfg)
    node.DEFEAT.update(TEMPERATURE=1.0, ADAPT=True, POSITIVE_WEIGHT=1.0)
    with pytest.raises(UserError, match="DeFeat needs RoI logits .* RetinaNet, has no RoI heads"):
        build_model(cfg)


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_a_detector_learns_from_it(arch, tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg(arch), tmp_path)
    node = cfg.MODEL.DISTILLER
    node.METHOD, node.LEVELS = "DeFeat", ["res4", "p3", "p5"]
    if arch == "GeneralizedRCNN":
        node.DEFEAT.POSITIVE_WEIGHT = node.DEFEAT.NEGATIVE_WEIGHT = 1.0
    model = build_model(cfg)
    method = model.distillation
    assert [x.name for x in method.neck] == ["p3", "p5"]
    assert [(x.name, x.teacher_name) for x in method.stages] == [("res4", "res4")]
    with EventStorage():
        losses = model(make_batch())
    own = {name: losses[name] for name in method.loss_names}
    assert len(own) == 6 and all(value.isfinite() for value in own.values())
    assert own["loss_defeat_background"] > 0 and own["loss_defeat_stage_background"] > 0
    rcnn = arch == "GeneralizedRCNN"
    assert (own["loss_defeat_negative"] > 0) == rcnn == ("regions" in model.table)
    sum(losses.values()).backward()
    for parameter in method.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
    student = model.student.backbone.bottom_up
    assert sum(p.grad.abs().sum() for p in student.parameters() if p.grad is not None) > 0
