import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.config import get_fgd_cfg
from fgd.errors import UserError
from fgd.methods.batch import Level
from fgd.methods.boxes import cells_on_levels
from fgd.methods.method import over_levels
from fgd.methods.tadf import (
    TADF,
    box_term,
    class_term,
    deltas_of_class,
    feature_term,
    gaussian_mask,
    where_teacher_improves,
)
from tests.fgd.methods.batches import make_batch
from tests.fgd.methods.fgd.test_method import WAITING, Recorder
from tests.fgd.methods.regions import batch_of, make_regions
from tests.fgd.methods.test_parts import reference_cells
from tests.fgd.training import distilled

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "tadf").glob("*.npz"))
WEIGHTS = {"feature": 2.0, "class": 3.0, "box": 0.5}
LEVELS = [Level("p3", 2, 3, "p3", 8), Level("p4", 3, 3, "p4", 16)]
PADDED = (40, 56)
BOXES = [torch.tensor([[3.0, 3, 30, 20], [-90, -90, 55, 39]]), torch.tensor([[8.0, 8, 40, 39]])]


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_masks(path, dtype, tolerance):
    content = np.load(path)
    boxes = list(torch.from_numpy(content["boxes"]).split(content["num_boxes"].tolist()))
    strides = content["strides"].tolist()
    sizes = [content[f"mask_{i}"].shape[-2:] for i in range(len(strides))]
    for i, cells in enumerate(cells_on_levels(boxes, strides, sizes)):
        found = gaussian_mask(cells, sizes[i], dtype)
        assert found.dtype == dtype
        assert abs(found.double().numpy() - content[f"mask_{i}"]).max() <= tolerance


def test_there_are_four_golden_cases():
    assert len(GOLDEN) == 4


def reference_bell(box, stride, size):
    """{(x, y): value} of one box by the equation."""
    cells = reference_cells(box, stride, size)
    if len(cells) == 1:  # of a box without an inner; one that fills a cell has w = h = 1
        x1, y1, x2, y2 = (math.trunc(edge / stride) for edge in box)
        if max(x1, 0) == min(x2, size[1]) or max(y1, 0) == min(y2, size[0]):
            return {cells[0]: 1.0}
    if not cells:
        return {}
    left, top = min(cells)
    w, h = max(cells)[0] - left + 1, max(cells)[1] - top + 1
    return {
        (x, y): math.exp(-0.5 * ((x - left - w / 2) / (w / 2)) ** 2)
        * math.exp(-0.5 * ((y - top - h / 2) / (h / 2)) ** 2)
        for x, y in cells
    }


coordinate = st.floats(-20, 84, width=32) | st.sampled_from([math.nan, math.inf, 64.0, 8.0, 16.0])


@settings(max_examples=60, deadline=None)
@given(
    boxes=st.lists(st.tuples(*[coordinate] * 4), max_size=70),  # more than a block of them
    stride=st.sampled_from([4, 8]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_masks_equal_the_literal_reference(boxes, stride, size):
    stacked = torch.tensor(boxes).reshape(-1, 4)
    (cells,) = cells_on_levels([stacked, stacked[:1]], [stride], [size])
    found = gaussian_mask(cells, size, torch.float64)
    wanted = torch.zeros(2, *size, dtype=torch.float64)
    for i, box in enumerate(stacked.double().tolist()):
        for (x, y), value in reference_bell(box, stride, size).items():
            for n in (0, 1) if i == 0 else (0,):
                wanted[n, y, x] = max(wanted[n, y, x].item(), value)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_masks_by_hand():
    def mask(*box, size=(4, 6)):
        (cells,) = cells_on_levels([torch.tensor([box])], [8], [size])
        return gaussian_mask(cells, size, torch.float64)[0]

    even = mask(8.0, 0, 40, 16)  # 4 x 2 cells
    e = math.exp
    column = [0, e(-0.5), e(-0.125), 1, e(-0.125), 0]
    torch.testing.assert_close(even[1], torch.tensor(column, dtype=torch.float64))
    torch.testing.assert_close(even[0], e(-0.5) * even[1])
    assert even[2:].sum() == 0
    assert mask(8.0, 8, 16, 16)[1, 1].item() == pytest.approx(e(-1))  # it fills one cell
    assert mask(9.0, 8, 10, 30)[1, 1] == 1  # thin
    assert mask(9.0, 8, 10, 30).sum() == 1


def softmax(row):
    total = math.fsum(math.exp(x - max(row)) for x in row)
    return [math.exp(x - max(row)) / total for x in row]


def iou(a, b):
    """nan for two boxes without area."""
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    inner = sides[0] * sides[1]
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inner / (sum(areas) - inner) if sum(areas) - inner else math.nan


def refine(box, deltas):
    width, height = box[2] - box[0], box[3] - box[1]
    x = box[0] + width / 2 + deltas[0] / 10 * width
    y = box[1] + height / 2 + deltas[1] / 10 * height
    width, height = width * math.exp(deltas[2] / 5), height * math.exp(deltas[3] / 5)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def reference_rows(logits, deltas, labels, proposals, targets):
    """(class term, box term) by the equations, row by row, and how many each takes."""
    classes = len(logits[0][0]) - 1 if len(labels) else 0
    divergences, distances = [], []
    for r, label in enumerate(labels):
        q_s, q_t = softmax(logits[0][r]), softmax(logits[1][r])
        object_ = 0 <= label < classes
        if object_ or label == classes and -math.log(q_s[-1]) > -math.log(q_t[-1]):
            divergences.append(sum(t * math.log(t / s) for s, t in zip(q_s, q_t, strict=True)))
        if not object_:
            continue
        own, taught = (x[r][4 * label : 4 * label + 4] for x in deltas)
        if iou(refine(proposals[r], taught), targets[r]) > iou(proposals[r], targets[r]):
            errors = [abs(s - t) for s, t in zip(own, taught, strict=True)]
            distances.append(sum(x - 0.5 if x > 1 else x * x / 2 for x in errors))
    return divergences, distances


def regions_of(labels, classes, seed=0):
    """Proposals around targets, as a matcher would give them."""
    count = len(labels)
    targets = random(count, 4, seed=seed, scale=5) + torch.tensor([20.0, 20, 60, 60])
    return make_regions(
        random(count, classes + 1, seed=seed + 1),
        random(count, classes + 1, seed=seed + 2),
        torch.tensor(labels).long(),
        deltas=tuple(random(count, 4 * classes, seed=seed + n) for n in (3, 4)),
        boxes=targets + random(count, 4, seed=seed + 5, scale=4),
        targets=targets,
    )


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 3), max_size=8),
    classes=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_rows_equal_the_literal_reference(labels, classes, seed):
    labels = [min(y, classes) for y in labels]
    regions = regions_of(labels, classes, seed)
    found = TADF([], WEIGHTS)(batch_of(regions))["regions"]
    sides = regions.student, regions.teacher
    divergences, distances = reference_rows(
        [x.logits.tolist() for x in sides],
        [x.deltas.tolist() for x in sides],
        labels,
        regions.boxes[0].tolist(),
        regions.targets.tolist(),
    )
    for term, values in (("class", divergences), ("box", distances)):
        wanted = WEIGHTS[term] * sum(values) / max(1, len(values))
        assert found[term].item() == pytest.approx(wanted, rel=1e-9, abs=1e-14)


def test_teacher_refines_one_of_two():
    """Deltas of class 1: a shift by 5 px of 50 is 10 * 0.1; the IoU rises, then it falls."""
    proposals = torch.tensor([[0.0, 0, 50, 50], [0, 0, 50, 50], [0, 0, 50, 50]])
    targets = torch.tensor([[5.0, 0, 55, 50], [-5, 0, 45, 50], [5, 0, 55, 50]])
    deltas = torch.tensor([[9.0, 9, 9, 9, 1, 0, 0, 0]]).repeat(3, 1)
    student = torch.tensor([[0.0, 0, 0, 0, 0, 3, 0, 0.5]]).repeat(3, 1)
    labels = torch.tensor([1, 1, 2])  # the last one is background
    logits = torch.zeros(3, 3)
    regions = make_regions(
        logits, logits, labels, deltas=(student, deltas), boxes=proposals, targets=targets
    )
    chosen = where_teacher_improves(regions, deltas_of_class(deltas, labels))
    assert chosen.tolist() == [True, False, False]
    own, taught = (deltas_of_class(x, labels) for x in (student, deltas))
    assert taught[0].tolist() == [1, 0, 0, 0]
    assert box_term(own, taught, chosen).item() == pytest.approx(0.5 + 2.5 + 0.125)
    # Standing still is no improvement.
    assert not where_teacher_improves(regions, torch.zeros(3, 4)).any()


def test_background_is_taken_where_the_student_is_worse():
    student = torch.tensor([[0.0, 0, 1], [0, 0, 3], [0, 0, 1]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0, 3], [0, 0, 1], [0, 0, 1]], dtype=torch.float64)
    labels = torch.tensor([2, 2, 0])
    kl = lambda r: sum(  # noqa: E731
        t * math.log(t / s) for s, t in zip(*(softmax(x[r].tolist()) for x in (student, teacher)))
    )
    found = class_term(student, teacher, labels, labels < 2)
    assert found.item() == pytest.approx((kl(0) + 0) / 2)  # row 0 and the object, which agrees
    only = class_term(student[:2], teacher[:2], labels[:2], labels[:2] < 2)
    assert only.item() == pytest.approx(kl(0))


@pytest.mark.parametrize("labels", [[], [3, 3], [-1]], ids=["none", "background", "ignored"])
def test_without_an_object_the_terms_are_zero_and_connected(labels):
    regions = regions_of(labels, 3)
    logits, deltas = (x.requires_grad_() for x in (regions.student.logits, regions.student.deltas))
    logits.data[:, 3] += 9  # the student gets background right
    found = TADF([], WEIGHTS)(batch_of(regions))["regions"]
    for value, source in ((found["class"], logits), (found["box"], deltas)):
        assert value.item() == 0
        assert torch.autograd.grad(value, source)[0].abs().sum() == 0


def maps(images=2):
    sizes = {"p3": (5, 7), "p4": (3, 4)}
    sides = []
    for k, seed in (("student_channels", 0), ("teacher_channels", 9)):
        level = {x.name: random(images, getattr(x, k), *sizes[x.name], seed=seed) for x in LEVELS}
        sides.append(level)
    return sides


def make():
    """With parameters away from their start near 0."""
    method = TADF(LEVELS, WEIGHTS).double()
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i, scale=0.3))
    return method


def test_feature_term_equals_the_literal_reference():
    method, (student, teacher) = make(), maps()
    batch = make_batch(student, teacher, BOXES, PADDED)
    batch.regions = regions_of([0, 3], 3)
    found = method(batch)
    for index, level in enumerate(LEVELS):
        adapted = torch.nn.functional.conv2d(
            student[level.name], *method.adapters[level.name].parameters(), padding=1
        ).tolist()
        taught, size = teacher[level.name].tolist(), tuple(teacher[level.name].shape[-2:])
        total = norm = 0.0
        for n, own in enumerate(BOXES):
            mask = {}
            for x1, y1, x2, y2 in own.double().tolist():
                side = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / 56 + 1e-6
                if min(max(math.floor(math.log2(side)), 0), 1) == index:
                    bell = reference_bell((x1, y1, x2, y2), level.stride, size)
                    mask = {k: max(mask.get(k, 0), bell.get(k, 0)) for k in {**mask, **bell}}
            for c in range(3):
                for (x, y), value in mask.items():
                    total += value * (adapted[n][c][y][x] - taught[n][c][y][x]) ** 2
                    norm += value
        assert norm > 1
        wanted = WEIGHTS["feature"] * total / (2 * norm)
        assert found[level.name]["feature"].item() == pytest.approx(wanted, rel=1e-9)


def test_gradcheck():
    method, (student, teacher) = make(), maps()
    names, keys = [n for n, _ in method.named_parameters()], list(student)
    fixed = regions_of([0, 3, 1, 3, 2, -1], 3)

    def terms(logits, deltas, *inputs):
        own = dict(zip(keys, inputs[: len(keys)], strict=True))
        parameters = dict(zip(names, inputs[len(keys) :], strict=True))
        batch = make_batch(own, teacher, BOXES, PADDED)
        batch.regions = make_regions(
            logits,
            fixed.teacher.logits,
            fixed.labels,
            deltas=(deltas, fixed.teacher.deltas),
            boxes=fixed.boxes[0],
            targets=fixed.targets,
        )
        table = torch.func.functional_call(method, parameters, (batch,))
        return tuple(value for level in table.values() for value in level.values())

    view = fixed.student
    inputs = view.logits.requires_grad_(), view.deltas.requires_grad_()
    student = [x.requires_grad_() for x in student.values()]
    inputs = (*inputs, *student, *method.parameters())
    assert torch.autograd.gradcheck(terms, inputs, fast_mode=True)


@pytest.mark.parametrize("empty", [(0,), (0, 1)], ids=["one", "all"])
def test_images_without_boxes_teach_no_feature(empty):
    boxes = [torch.zeros(0, 4) if n in empty else own for n, own in enumerate(BOXES)]
    student, teacher = maps()
    student = {k: x.requires_grad_() for k, x in student.items()}
    batch = make_batch(student, teacher, boxes, PADDED)
    batch.regions = regions_of([3, 3], 3)
    value = over_levels(make()(batch))["feature"]
    assert (value.item() == 0) == (len(empty) == 2)
    gradient = torch.autograd.grad(value, student["p3"])[0]
    assert gradient[0].abs().sum() == 0
    assert (gradient[1].abs().sum() == 0) == (len(empty) == 2)


def test_a_constant_difference_gives_half_its_square_under_any_mask():
    teacher = random(2, 3, 4, 5)
    mask = random(2, 4, 5, seed=1).abs()
    assert feature_term(teacher + 0.6, teacher, mask).item() == pytest.approx(0.18)
    assert feature_term(teacher, teacher, mask) == 0
    assert feature_term(teacher + 0.6, teacher, 0 * mask) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1)])
def test_odd_sizes(size):
    method = TADF([Level("p3", 2, 2, "p3", 8)], {**WEIGHTS, "class": 0.0, "box": 0.0}).double()
    student, teacher = ({"p3": random(1, 2, *size, seed=n)} for n in (0, 1))
    table = method(make_batch(student, teacher, [torch.tensor([[0.0, 0, 7, 7]])], PADDED))
    assert list(table) == ["p3"] and table["p3"]["feature"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    method = TADF([Level("p3", 8, 8, "p3", 8)], WEIGHTS)
    found = []
    for cast in (dtype, torch.float64):
        sides = [(10 * random(1, 8, 100, 168, seed=n)).to(dtype).to(cast) for n in (0, 1)]
        box = torch.tensor([[0.0, 0, 1300, 790]])
        batch = make_batch({"p3": sides[0]}, {"p3": sides[1]}, [box], (800, 1344))
        batch.regions = regions_of([0, 1, 3, 3, 2], 3)
        for view in (batch.regions.student, batch.regions.teacher):
            for part in (view.logits, view.deltas):
                part.data = part.to(dtype).to(cast)
        found.append(over_levels(method.to(torch.promote_types(cast, torch.float32))(batch)))
    for name, value in found[0].items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(found[1][name].item(), rel=1e-4)


def test_the_host_never_waits_for_a_value():
    method, (student, teacher) = make(), maps()
    batch = make_batch({k: x.requires_grad_() for k, x in student.items()}, teacher, BOXES, PADDED)
    batch.regions = regions_of([0, 3, 1, 3, 2, -1], 3)
    with Recorder() as recorder:
        sum(over_levels(method(batch)).values()).backward()
    assert "convolution" in recorder.seen and not recorder.seen & WAITING


def test_pictures_show_the_bells():
    student, teacher = maps()
    found = make().pictures(make_batch(student, teacher, BOXES, PADDED), 1)
    assert list(found["p3"]) == ["objects", "teacher response", "student response"]
    # 4 x 3 cells: the middle of the rows is 1/3 of half a side off.
    peak = found["p3"]["objects"].values.max()
    assert peak == pytest.approx(math.exp(-1 / 18)) and found["p4"]["objects"].values.max() == 0


def test_config():
    node = get_fgd_cfg().MODEL.DISTILLER.TADF
    assert dict(node) == {"FEATURE_WEIGHT": 1.0, "CLASS_WEIGHT": 1.0, "BOX_WEIGHT": 1.0}
    assert TADF.needs_of(node) == {"teacher", "maps", "region_logits", "region_deltas"}
    node.BOX_WEIGHT = 0.0
    assert TADF.needs_of(node) == {"teacher", "maps", "region_logits"}
    node.CLASS_WEIGHT = 0.0
    assert TADF.needs_of(node) == {"teacher", "maps"}


def test_pairs_and_levels_that_cannot_work_are_refused(tiny_cfg, tmp_path):
    cfg = tiny_cfg("GeneralizedRCNN")
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (20.0, 20.0, 10.0, 10.0)
    cfg = distilled(cfg, tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "TADF"
    with pytest.raises(UserError) as error:
        build_model(cfg)
    assert "\n" not in str(error.value)
    assert "TADF needs box deltas of proposals, for each class and on one scale" in str(error.value)
    cfg.MODEL.DISTILLER.TADF.BOX_WEIGHT = 0.0
    build_model(cfg)
    cfg.MODEL.DISTILLER.LEVELS = ["p3", "res4"]
    with pytest.raises(UserError, match="LEVELS: 'res4' is a stage of the backbone; TADF compares"):
        build_model(cfg)


def test_a_detector_learns_from_it(tiny_cfg, tmp_path, make_batch):
    cfg = distilled(tiny_cfg("GeneralizedRCNN"), tmp_path)
    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.SCHEDULE.DECAY = "TADF", "linear"
    cfg.SOLVER.MAX_ITER = 4
    model = build_model(cfg)
    with EventStorage(1) as storage:
        losses = model(make_batch())
    assert storage.iter == 1 and model.factor == 0.75  # 1 - t / t_max
    own = {name: losses[name] for name in model.distillation.loss_names}
    assert list(own) == ["loss_tadf_feature", "loss_tadf_class", "loss_tadf_box"]
    assert all(value.isfinite() and value >= 0 for value in own.values())
    assert own["loss_tadf_feature"] > 0 and own["loss_tadf_class"] > 0
    sum(own.values()).backward()
    for name, parameter in model.distillation.named_parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0 or "p2" not in name  # where the boxes are
    body = model.student.backbone.bottom_up
    assert sum(p.grad.abs().sum() for p in body.parameters() if p.grad is not None) > 0
