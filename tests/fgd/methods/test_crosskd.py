import copy
import functools
import math
import weakref
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import fcos as d2_fcos
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fgd.config import check_config
from fgd.distillation.distiller import Distiller
from fgd.distillation.heads import HeadTap, heads_of
from fgd.distillation.needs import check_needs
from fgd.distillation.teacher import FrozenTeacher
from fgd.distillation.towers import LevelRun
from fgd.errors import UserError
from fgd.methods.batch import Cut, HeadTargets
from fgd.methods.crosskd import (
    CrossKD,
    aligned,
    box_sum,
    by_anchor,
    class_sum,
    giou_distance,
    log_distance,
    moments,
)
from tests.conftest import make_tiny_cfg
from tests.fgd.methods.batches import make_batch as batch_of
from tests.fgd.training import distilled

from ..distillation.test_distiller import fcos

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "crosskd").glob("*.npz"))
# The authors' names of a head's modules and Detectron2's.
NAMES = {"retina_cls": "cls_score", "retina_reg": "bbox_pred", "conv_cls": "cls_score"}
NAMES |= {"conv_reg": "bbox_pred", "conv_centerness": "ctrness"}
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, wanted, tolerance):
    largest = max(float(wanted.abs().max()), 1e-6)
    assert float((actual - wanted).abs().max()) <= tolerance * largest


class Golden:
    """One file: heads of Detectron2 with its parameters, and what a method is given of them."""

    def __init__(self, path, dtype):
        self.content, self.dtype = np.load(path), dtype
        self.levels = range(int(self.content["num_levels"]))
        self.family = "FCOS" if self.content["family"] == "fcos" else "RetinaNet"
        self.conv = int(self.content["reused_from"])
        self.student = self.detector("param")
        self.teacher = self.detector("teacher_param").head.requires_grad_(False)
        self.maps = [self[f"student_{k}"].requires_grad_() for k in self.levels]

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.content[key])).to(self.dtype)

    def packed(self, names, values, shapes):
        """Parameter → tensor, under Detectron2's names; the scales under their own."""
        found, start = {}, 0
        for name, shape in zip(self.content[names], self.content[shapes], strict=True):
            shape = shape[shape > 0].tolist()
            part = self[values][start : start + math.prod(shape)].reshape(shape)
            start += part.numel()
            found[self.rename(name.decode())] = part
        return found

    def rename(self, name):
        first, *rest = name.split(".")
        if first in ("cls_convs", "reg_convs"):
            tower = {"cls_convs": "cls_subnet", "reg_convs": "bbox_subnet"}[first]
            steps = 3 if self.content["group_norm"] else 2
            return f"{tower}.{steps * int(rest[0]) + (rest[1] == 'gn')}.{rest[2]}"
        return ".".join([NAMES.get(first, first), *rest])

    def detector(self, key):
        content, (channels, *_) = self.content, self.content["student_0"].shape[1:]
        convs = [channels] * int(content["stacked_convs"])
        options = {
            "input_shape": [ShapeSpec(channels=channels)] * len(self.levels),
            "num_classes": int(content["num_classes"]),
            "conv_dims": convs,
        }
        names = [f"p{3 + k}" for k in self.levels]
        backbone = nn.Module()
        backbone.output_shape = lambda: {x: ShapeSpec(stride=8) for x in names}
        common = {"num_classes": options["num_classes"], "pixel_mean": [0.0], "pixel_std": [1.0]}
        common |= {"backbone": backbone, "head_in_features": names}
        if self.family == "FCOS":
            # Detectron2 tries the norm on one channel.
            norm = lambda c: nn.GroupNorm(math.gcd(c, int(content["num_groups"])), c)  # noqa: E731
            model = d2_fcos.FCOS(head=d2_fcos.FCOSHead(**options, norm=norm), **common)
        else:
            anchors = int(content["anchors_per_cell"])
            model = RetinaNet(
                head=RetinaNetHead(**options, num_anchors=anchors),
                anchor_generator=nn.Identity(),
                box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
                anchor_matcher=None,
                **common,
            )
        parameters = self.packed(f"{key}_names", f"{key}_values", f"{key}_shapes")
        self.scales = [parameters.pop(f"scales.{k}.scale", None) for k in self.levels]
        model.to(self.dtype)
        missing, unexpected = model.head.load_state_dict(parameters, strict=False)
        # The authors' convolutions have no bias where a norm follows.
        assert not unexpected and all(x.endswith(".bias") for x in missing)
        with torch.no_grad():
            for name in missing:
                model.head.get_parameter(name).zero_()
        return model

    def anchors(self, level):
        if self.family == "RetinaNet":
            return Boxes(self[f"anchors_{level}"])
        return Boxes(torch.cat([self[f"points_{level}"] - 4, self[f"points_{level}"] + 4], dim=1))

    def heads(self, method):
        """As the Distiller makes them, but for what differs in the authors' detectors."""
        anchors = [self.anchors(k) for k in self.levels]
        self.student.anchor_generator = nn.Identity()
        tap = HeadTap(self.student, [method.cut])
        self.student.train()
        self.student.head(self.maps)
        self.student.anchor_generator(anchors)
        taught = {
            k: LevelRun(self.teacher, k, 0, (x, x), torch.no_grad, [method.cut])
            for k, x in ((k, self[f"teacher_{k}"]) for k in self.levels)
        }
        heads = heads_of(tap.pop(), self.student, [], self.teacher, taught)
        labels = {}
        for k, name in enumerate(heads.levels):
            shape = self.maps[k].shape[0], len(anchors[k])
            weights = torch.ones(shape)
            if self.family == "RetinaNet":
                weights = self[f"label_weights_{k}"]
            labels[name] = torch.where(weights > 0, heads.num_classes, -1)
        targets = HeadTargets(labels, self["avg_factor"])
        heads = replace(heads, targets=lambda: targets)
        return replace(heads, decode=self.decode) if self.family == "FCOS" else heads

    def decode(self, level, deltas):
        """The authors' FCOS: distances are exponentials in pixels, with a scale for each level."""
        k = int(level[1:]) - 3
        points, distance = self[f"points_{k}"], (deltas * self.scales[k]).exp()
        return torch.cat([points - distance[..., :2], points + distance[..., 2:]], dim=-1)

    def method(self):
        weights = {"class": float(self["weight_cls"]), "box": float(self["weight_reg"])}
        return CrossKD([], weights, Cut(self.conv), float(self["beta"]))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_golden_values_and_every_gradient(path, dtype, tolerance):
    golden = Golden(path, dtype)
    assert golden.content["held_after_relu"] == 1
    method = golden.method()
    table = method(batch_of({}, {}, [torch.zeros(0, 4)], (32, 40), heads=golden.heads(method)))
    sums = {term: sum(x[term] for x in table.values()) for term in ("class", "box")}
    close(sums["class"].detach(), golden["loss_cls"], tolerance)
    close(sums["box"].detach(), golden["loss_reg"], tolerance)
    (sums["class"] + sums["box"]).backward()
    for k in golden.levels:
        close(golden.maps[k].grad, golden[f"grad_student_{k}"], tolerance)
    wanted = golden.packed("param_names", "grad_values", "param_shapes")
    compared = 0
    for name, gradient in wanted.items():
        if name.startswith("scales"):  # of the student's own predictions: nothing arrives
            assert gradient == 0
            continue
        own = golden.student.head.get_parameter(name).grad
        # A bias before a group norm or the alignment is cancelled: 0 but for rounding.
        close(torch.zeros_like(gradient) if own is None else own, gradient, tolerance)
        compared += gradient.abs().sum() > 0
    assert compared >= 2 * golden.conv
    assert all(x.grad is None for x in golden.teacher.parameters())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_crossed_predictions(path):
    golden = Golden(path, torch.float64)
    method = golden.method()
    heads = golden.heads(method)
    for k, name in enumerate(heads.levels):
        crossed = heads.cross(name, golden.conv, *method._handed(heads, name))
        close(crossed.logits.detach(), golden[f"reused_cls_{k}"], 1e-9)
        deltas = crossed.deltas.detach()
        if golden.family == "FCOS":
            deltas = (deltas * golden.scales[k]).exp()
        close(deltas, golden[f"reused_reg_{k}"], 1e-9)


def test_there_are_three_golden_cases():
    assert len(GOLDEN) == 3


def literal_class(crossed, scores, weights, beta):
    total = 0.0
    for index in product(*map(range, crossed.shape)):
        n, a, _, y, x = index
        z, q, w = crossed[index].item(), scores[index].item(), weights[n, a, y, x].item()
        p = 1 / (1 + math.exp(-z))
        entropy = -(q * math.log(p) + (1 - q) * math.log1p(-p))
        total += w * abs(p - q) ** beta * entropy
    return total


def literal_overlap(a, b):
    """(intersection, union) of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return overlap, max(areas[0] + areas[1] - overlap, 1e-6)


def literal_giou(a, b):
    overlap, union = literal_overlap(a, b)
    width = max(max(a[2], b[2]) - min(a[0], b[0]), 0.0)
    height = max(max(a[3], b[3]) - min(a[1], b[1]), 0.0)
    hull = max(width * height, 1e-6)
    return 1 - (overlap / union - (hull - union) / hull)


def literal_log(a, b):
    overlap, union = literal_overlap(a, b)
    return -math.log(max(overlap / union, 1e-6))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (2, 3, 3, 3, 3)]),
    beta=st.sampled_from([0.0, 1.0, 1.5, 2.0]),
    seed=st.integers(0, 99),
)
def test_class_sum_equals_the_literal_reference(shape, beta, seed):
    crossed, scores = 3 * random(*shape, seed=seed), uniform(*shape, seed=seed + 100)
    weights = (uniform(shape[0], shape[1], *shape[3:], seed=seed + 200) > 0.3).double()
    found = class_sum(crossed, scores, weights, beta).item()
    wanted = literal_class(crossed, scores, weights, beta)
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-13)


coordinate = st.floats(-20, 20).map(lambda x: round(4 * x) / 4)  # ties, and empty and inverted


@settings(max_examples=100, deadline=None)
@given(boxes=st.lists(st.tuples(*[coordinate] * 8), min_size=1, max_size=6))
def test_distances_equal_the_literal_reference(boxes):
    rows = torch.tensor(boxes, dtype=torch.float64)
    for distance, literal in ((giou_distance, literal_giou), (log_distance, literal_log)):
        found = distance(rows[:, :4], rows[:, 4:])
        wanted = torch.tensor([literal(x[:4], x[4:]) for x in boxes], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(*[st.integers(1, n) for n in (3, 3, 4, 4)]), seed=st.integers(0, 99))
def test_aligned_equals_the_literal_reference(shape, seed):
    student, teacher = random(*shape, seed=seed), 2 * random(*shape, seed=seed + 100) + 1
    found = aligned(student, moments(teacher))
    for c in range(shape[1]):
        figures = []
        for x in (student, teacher):
            values = x[:, c].flatten().tolist()
            mean = math.fsum(values) / len(values)
            square = math.fsum((v - mean) ** 2 for v in values)
            figures.append((mean, math.sqrt(square / max(len(values) - 1, 1))))
        (mean, spread), (wanted_mean, wanted_spread) = figures
        wanted = (student[:, c] - mean) / (spread + 1e-6) * wanted_spread + wanted_mean
        torch.testing.assert_close(found[:, c], wanted, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    scores, weights = uniform(1, 2, 2, 2, 2), uniform(1, 2, 2, 2, seed=1)
    for beta in (0.0, 1.0, 2.0):
        crossed = random(1, 2, 2, 2, 2, seed=2).requires_grad_()
        loss = lambda x: class_sum(x, scores, weights, beta)  # noqa: B023, E731
        assert torch.autograd.gradcheck(loss, crossed)
    anchors = torch.tensor([[0.0, 0, 8, 8]]).double()
    decode = lambda x: x + anchors  # noqa: E731
    taught = random(1, 8, 2, 2, seed=3)
    for distance in (giou_distance, log_distance):
        loss = lambda x: box_sum(x, taught, weights, decode, distance)  # noqa: B023, E731
        assert torch.autograd.gradcheck(loss, random(1, 8, 2, 2, seed=4).requires_grad_())
    teacher = moments(random(2, 3, 2, 3))
    own = random(2, 3, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aligned(x, teacher), own)


def test_cases_by_hand():
    # z = 0 is a score of 1/2: |1/2 - 3/4| · ln 2 for either class, of the counted anchor alone.
    scores = torch.full((1, 2, 2, 1, 1), 0.75, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    crossed = torch.zeros_like(scores).requires_grad_()
    value = class_sum(crossed, scores, weights)
    value.backward()
    assert value.item() == pytest.approx(2 * 0.25 * math.log(2), rel=1e-14)
    # sign(d) p (1 - p) BCE + |d| d
    slope = -0.25 * math.log(2) - 0.0625
    wanted = torch.tensor([slope, slope, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(crossed.grad.flatten(), wanted)
    a, b = torch.tensor([[0.0, 0, 2, 2], [2.0, 0, 4, 2]])  # side by side in a hull that they fill
    assert giou_distance(a, b) == 1 and log_distance(a, b).item() == pytest.approx(-math.log(1e-6))
    c = torch.tensor([0.0, 0, 2, 4])
    assert giou_distance(a, c) == 0.5 and log_distance(a, c).item() == pytest.approx(math.log(2))
    assert giou_distance(a, a) == 0 == log_distance(a, a)
    rows = by_anchor(torch.arange(16.0).view(1, 8, 1, 2))
    assert rows.tolist() == [[[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]]


def test_equal_predictions_have_neither_value_nor_gradient():
    logits = 3 * random(2, 2, 3, 2, 2)
    for beta in (1.0, 2.0):
        crossed = logits.clone().requires_grad_()
        value = class_sum(crossed, logits.sigmoid(), torch.ones(2, 2, 2, 2).double(), beta)
        value.backward()
        assert value.item() == 0 and crossed.grad.abs().max() == 0


def test_a_map_of_one_position_and_a_constant_channel_become_the_teachers_mean():
    teacher = random(1, 3, 1, 1)
    student = random(1, 3, 1, 1, seed=1).requires_grad_()
    found = aligned(student, moments(teacher))
    assert torch.equal(found, teacher)
    found.square().sum().backward()
    assert student.grad.abs().max() == 0
    teacher, student = random(2, 2, 3, 3), random(2, 2, 3, 3, seed=1)
    student[:, 0] = 0  # as a channel behind ReLU that is never active
    student.requires_grad_()
    found = aligned(student, moments(teacher))
    torch.testing.assert_close(found[:, 0], teacher[:, 0].mean().expand(2, 3, 3))
    found.square().sum().backward()
    assert student.grad.isfinite().all()


def test_alignment_forgets_scale_and_offset():
    student, teacher = random(2, 3, 3, 4), moments(random(2, 3, 3, 4, seed=1))
    wanted = aligned(student, teacher)
    scale, offset = uniform(1, 3, 1, 1) + 0.5, random(1, 3, 1, 1)
    torch.testing.assert_close(
        aligned(student * scale + offset, teacher), wanted, atol=1e-5, rtol=0
    )
    own = moments(wanted)
    torch.testing.assert_close(own.mean, teacher.mean)
    torch.testing.assert_close(own.spread, teacher.spread, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_summed_in_float32(dtype):
    # 4096 * 80 terms near 1 and more: a sum of float16 overflows.
    crossed, taught = (4 * random(1, 1, 80, 64, 64, seed=k) for k in (0, 1))
    boxes, wanted = (random(1, 4, 64, 64, seed=k).to(dtype) for k in (2, 3))
    crossed, weights = crossed.to(dtype).requires_grad_(), torch.ones(1, 1, 64, 64)
    value = class_sum(crossed, taught.float().sigmoid(), weights)
    exact = class_sum(crossed.detach().double(), taught.sigmoid(), weights.double())
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=1e-4)
    value.backward()
    assert crossed.grad.dtype == dtype and crossed.grad.isfinite().all()
    anchors = torch.tensor([[0.0, 0, 8, 8]])
    decode = lambda x: x.to(torch.promote_types(x.dtype, torch.float32)) + anchors  # noqa: E731
    found = box_sum(boxes.requires_grad_(), wanted, weights, decode, giou_distance)
    sides = boxes.detach().double(), wanted.double()
    exact = box_sum(*sides, weights.double(), decode, giou_distance)
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)
    found.backward()
    assert boxes.grad.dtype == dtype and boxes.grad.abs().sum() > 0


def dense_cfg(kind="RetinaNet", convs=3):
    cfg = fcos(make_tiny_cfg, 16) if kind == "FCOS" else make_tiny_cfg()
    cfg.MODEL[kind.upper()].NUM_CONVS = convs
    return cfg


@functools.cache
def detector(kind, seed):
    """Whose predictions differ from cell to cell: those of a new head do next to nothing."""
    torch.manual_seed(seed)
    model = build_model(dense_cfg(kind))
    with torch.no_grad():
        for module in model.head.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=0.1)
    return model


def mimicked(batch, kind="RetinaNet", conv=2, activated=True, beta=1.0):
    """A Distiller after one step, and its two losses, whose gradients are in the model."""
    cut = Cut(conv, activated)
    student, teacher = (copy.deepcopy(detector(kind, seed)) for seed in (0, 1))
    model = Distiller(
        student=student,
        teacher=FrozenTeacher(teacher, "BGR", "BGR", sources={}, keep=["head"]),
        distillation=CrossKD([], {"class": 1.0, "box": 1.0}, cut, beta),
        sources={},
        asked_for=CrossKD.needs,
        cuts=[cut],
    ).train()
    with EventStorage():
        losses = model(batch)
    terms = {k: losses[f"loss_crosskd_{k}"] for k in ("class", "box")}
    sum(terms.values()).backward()
    return model, {k: x.item() for k, x in terms.items()}


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
@pytest.mark.parametrize("conv", [0, 2, 3])
def test_gradients_end_where_the_teachers_head_takes_over(kind, conv, make_batch):
    model, terms = mimicked(make_batch(), kind, conv)
    assert all(math.isfinite(x) and x > 0 for x in terms.values())
    assert list(model.table) == ["p3", "p4", "p5", "p6", "p7"]
    head, steps = model.student.head, 3 if kind == "FCOS" else 2
    for tower in (head.cls_subnet, head.bbox_subnet):
        for k in range(3):
            gradient = tower[steps * k].weight.grad
            assert (gradient is not None and gradient.abs().sum() > 0) == (k < conv), k
    predictors = [x for n, x in head.named_parameters() if "subnet" not in n]
    assert all(x.grad is None for x in predictors)
    for module in (model.student.backbone.bottom_up, model.student.backbone):
        assert next(module.parameters()).grad.abs().sum() > 0
    frozen = [p for part in model.teacher.parts.values() for p in part.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not list(model.distillation.parameters())


def test_the_places_of_crossing_differ(make_batch):
    options = {}, {"activated": False}, {"conv": 1}, {"beta": 2.0}
    values = [mimicked(make_batch(), **keys)[1]["class"] for keys in options]
    assert len(set(values)) == 4
    first, second = (mimicked(make_batch(), conv=0, activated=x)[1] for x in (True, False))
    assert first == second


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_images_without_objects_are_taught_as_others(kind, make_batch):
    usual = mimicked(make_batch(), kind)[1]
    for empty in ((1,), (0, 1)):
        batch = make_batch()
        for k in empty:
            batch[k]["instances"] = batch[k]["instances"][:0]
        model, terms = mimicked(batch, kind)
        assert all(0 < x < 200 * usual[k] for k, x in terms.items())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(x.isfinite().all() for x in gradients)
    # p7 of one small image is a single cell: nothing is taught there.
    model, _ = mimicked(make_batch([(64, 96)]), kind)
    assert model.table["p6"]["crosskd_class"] > 5e-5
    assert model.table["p7"]["crosskd_class"].item() == pytest.approx(0, abs=1e-6)
    if kind == "RetinaNet":  # FCOS has boxes without area, which do not overlap themselves
        assert model.table["p7"]["crosskd_box"].item() == pytest.approx(0, abs=1e-6)


def test_ignored_anchors_do_not_count():
    golden = Golden(next(x for x in GOLDEN if "ignored" in x.stem), torch.float64)
    method = golden.method()
    heads = golden.heads(method)
    labels = heads.targets().labels["p3"]
    assert (labels < 0).any() and (labels >= 0).any()
    table = method(batch_of({}, {}, [], (32, 40), heads=heads))
    none = HeadTargets({"p3": torch.full_like(labels, -1)}, torch.tensor(1.0))
    empty = method(batch_of({}, {}, [], (32, 40), heads=replace(heads, targets=lambda: none)))
    assert [x.item() for x in empty["p3"].values()] == [0, 0]
    every = HeadTargets({"p3": labels.clamp(min=0)}, heads.targets().average_factor)
    more = method(batch_of({}, {}, [], (32, 40), heads=replace(heads, targets=lambda: every)))
    assert all(more["p3"][k] > x for k, x in table["p3"].items())


def test_under_amp(make_batch):
    exact = mimicked(make_batch())[1]
    with torch.autocast("cpu", torch.bfloat16):
        model, terms = mimicked(make_batch())
    assert terms == pytest.approx(exact, rel=0.2) and terms != exact
    assert next(model.student.backbone.bottom_up.parameters()).grad.isfinite().all()


def test_what_is_held_until_the_backward_pass(make_batch):
    batch = make_batch()
    model, _ = mimicked(batch)
    with EventStorage():
        _, seen = model.run_student(batch)
    kept = []
    pack = lambda x: kept.append(weakref.ref(x)) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        table = model.terms(model.batch(seen, batch))
    own = {x.data_ptr() for level in seen.head.levels for x in level.class_maps.values()}
    own |= {x.data_ptr() for level in seen.head.levels for x in level.box_maps.values()}
    own |= {x.data_ptr() for x in model.teacher.parts["head"].parameters()}
    held = {x().data_ptr(): x().numel() for x in kept if x() is not None}
    held = sum(count for where, count in held.items() if where not in own)
    cells = sum(x.shape[0] * x.shape[2:].numel() for x in seen.head.maps)
    # Of a cell: both towers' two inputs of the teacher's convolutions, 3 logits and 4 deltas.
    assert 0.9 * cells * (4 * 16 + 7) < held < 1.1 * cells * (4 * 16 + 7)
    assert table["p3"]["crosskd_class"].requires_grad


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Of a student and a teacher that are alike but for their weights."""
    monkeypatch.setattr("tests.fgd.training.make_tiny_cfg", lambda *a, channels: dense_cfg())
    cfg = distilled(dense_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "CrossKD"
    return cfg


def test_config(cfg, make_batch):
    node = cfg.MODEL.DISTILLER.CROSSKD
    assert dict(node) == {
        "CLASS_WEIGHT": 1.0,
        "BOX_WEIGHT": 1.0,
        "BETA": 1.0,
        "REUSED_FROM": 3,
        "BEFORE_ACTIVATION": False,
    }
    check_config(cfg)
    for key, value, rule in (
        ("BETA", 0.5, "neither 0 nor"),
        ("BETA", math.nan, "neither 0 nor"),
        ("BETA", -1.0, "neither 0 nor"),
        ("REUSED_FROM", -1, "not a number from 0 on"),
    ):
        wrong = cfg.clone()
        wrong.MODEL.DISTILLER.CROSSKD[key] = value
        with pytest.raises(UserError, match=rf"CROSSKD\.{key}: {value} is {rule}"):
            check_config(wrong)
    node.update(CLASS_WEIGHT=0.5, BOX_WEIGHT=0.0, BETA=2.0, BEFORE_ACTIVATION=True)
    model = build_model(cfg)
    method = model.distillation
    assert (method.cut, method.beta) == (Cut(3, False), 2.0)
    assert method.weights == {"class": 0.5, "box": 0.0}
    with EventStorage():
        losses = model(make_batch())
    assert losses["loss_crosskd_class"] > 0 and losses["loss_crosskd_box"] == 0
    assert "CrossKD (class_weight 0.5" in model.describe()


def test_pairs_that_cannot_cross_are_refused(cfg):
    def refused(student, teacher, reason):
        with pytest.raises(UserError, match=reason) as error:
            check_needs(cfg, *(build_model(x) for x in (student, teacher)))
        text = str(error.value)
        assert text.startswith("MODEL.DISTILLER.METHOD CrossKD needs dense heads of one kind")
        assert "\n" not in text and "These work here: " in text
        assert "CrossKD" not in text.split("These work here")[1]

    def changed(node, key, value):
        other = dense_cfg()
        other.MODEL[node][key] = value
        return other

    own, short = dense_cfg(), dense_cfg(convs=2)
    place = r"after convolution 3 \(REUSED_FROM\)"
    refused(short, own, f"{place} of the towers, and the student's have 2")
    refused(own, short, f"{place} of the towers, and the teacher's have 2")
    refused(own, dense_cfg("FCOS"), "family: the student has RetinaNet, the teacher FCOS")
    refused(own, changed("RETINANET", "NUM_CLASSES", 4), "classes: the student has 3, the teach")
    refused(own, changed("FPN", "OUT_CHANNELS", 8), f"{place} the student's towers are 16 .*8")
    ratios = changed("ANCHOR_GENERATOR", "ASPECT_RATIOS", [[1.0, 2.0]])
    refused(own, ratios, "anchors per cell: the student has")
    refused(make_tiny_cfg("GeneralizedRCNN"), own, "the student, GeneralizedRCNN, has no plain")
