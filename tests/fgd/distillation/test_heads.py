"""Heads are what the networks' own forwards compute; of the teacher only what is asked for."""

import gc
import math
import weakref
from itertools import product

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from fgd.distillation import needs
from fgd.distillation.distiller import Distiller
from fgd.distillation.heads import HeadTap, family, mean_over_processes, why_no_heads
from fgd.distillation.teacher import FrozenTeacher
from fgd.distillation.towers import decode, place_of, steps_of
from fgd.errors import UserError
from fgd.methods.batch import Cut
from fgd.methods.method import METHOD_REGISTRY, Method

from ..training import distilled
from .test_distiller import fcos, reppoints

CONVS = 2
CUTS = [Cut(0), *(Cut(conv, activated) for conv in (1, 2) for activated in (False, True))]
KINDS = [("RetinaNet", ""), ("RetinaNet", "BN"), ("FCOS", "GN"), ("FCOS", "BN")]
kinds = pytest.mark.parametrize("kind, norm", KINDS, ids=["-".join(x) for x in KINDS])
OTHER = {"class_maps": "box_maps", "box_maps": "class_maps"}


@pytest.fixture
def dense_cfg(tiny_cfg):
    def make(kind="RetinaNet", norm="", channels=16, convs=CONVS, anchors=2):
        cfg = fcos(tiny_cfg, channels) if kind == "FCOS" else tiny_cfg(channels=channels)
        cfg.MODEL[kind.upper()].update(NORM=norm, NUM_CONVS=convs)
        cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0, 2.0, 0.5][:anchors]]
        return cfg

    return make


def build(cfg, seed):
    """A detector whose norms differ between levels and whose predictions are not small."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        for module in model.head.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=0.1)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def look(student, teacher, batch, cuts=CUTS, precision="float32", amp=False):
    """The heads that a method would be given, and the frozen teacher."""
    frozen = FrozenTeacher(teacher, "BGR", "BGR", precision, sources={}, keep=["head"])
    distiller = Distiller(
        student=student,
        teacher=frozen,
        distillation=Method([], {}),
        sources={},
        asked_for=("teacher", "heads"),
        cuts=cuts,
    ).train()
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        _, seen = distiller.run_student(batch)
    return distiller.batch(seen, batch).heads


def own_maps(model, batch):
    """What a detector's head reads, computed by itself."""
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    return [features[name] for name in model.head_in_features]


def by_hand(tower, cut, maps):
    """Maps of all levels at a cut, by the tower's modules called in turn."""
    count, index = 0, len(tower)
    for k, module in enumerate(tower):
        if isinstance(module, nn.Conv2d):
            if count == cut.conv:
                index = k if cut.activated or not count else k - 1
                break
            count += 1
    else:
        index = len(tower) - (not cut.activated)
    found = []
    for x in maps:  # norms of each level count their calls, so level after level
        for module in tower[:index]:
            x = module(x)
        found.append(x)
    for module in tower[index:]:  # to the end, for the count to come round
        for x in found:
            if isinstance(module, nn.ModuleList):
                module(x)
    return found


def predictions(level):
    return [x for x in (level.logits, level.deltas, level.centerness) if x is not None]


@kinds
def test_the_students_side_is_its_own_forward(kind, norm, dense_cfg, make_batch):
    student = build(dense_cfg(kind, norm), 0)
    batch = make_batch()
    heads = look(student, build(dense_cfg(kind, norm), 1), batch)
    assert heads.levels == ["p3", "p4", "p5", "p6", "p7"] == list(heads.student)
    assert (heads.family, heads.num_classes) == (kind, 3)
    maps = own_maps(student, batch)
    wanted = student.head(maps)
    assert len(wanted) == (3 if kind == "FCOS" else 2)
    for k, level in enumerate(heads.student.values()):
        for found, own in zip(predictions(level), wanted, strict=True):
            torch.testing.assert_close(found, own[k])
    for cut, (side, tower) in product(CUTS, {"class": "cls_subnet", "box": "bbox_subnet"}.items()):
        for level, own in zip(
            heads.student.values(), by_hand(getattr(student.head, tower), cut, maps), strict=True
        ):
            torch.testing.assert_close(getattr(level, f"{side}_maps")[cut], own)
    body = next(student.backbone.bottom_up.parameters())
    for part in (*predictions(heads.student["p3"]), heads.student["p3"].box_maps[Cut(1, False)]):
        (gradient,) = torch.autograd.grad(part.square().sum(), body, retain_graph=True)
        assert gradient.abs().sum() > 0


@kinds
def test_the_teachers_side_is_its_own_forward(kind, norm, dense_cfg, make_batch):
    teacher = build(dense_cfg(kind, norm, channels=24), 1)
    batch = make_batch()
    heads = look(build(dense_cfg(kind, norm), 0), teacher, batch, [])
    cut_heads = look(build(dense_cfg(kind, norm), 0), teacher, batch)
    with torch.no_grad():
        maps = own_maps(teacher.eval(), batch)
        wanted = teacher.head(maps)
        for k in (4, 0, 2, 1, 3):  # levels in any order
            name = heads.levels[k]
            for found, own in zip(predictions(heads.teacher[name]), wanted, strict=True):
                assert torch.equal(found, own[k]) and not found.requires_grad
        towers = {"class_maps": teacher.head.cls_subnet, "box_maps": teacher.head.bbox_subnet}
        for cut, (side, tower) in product(CUTS[::-1], towers.items()):
            for level, own in zip(cut_heads.levels, by_hand(tower, cut, maps), strict=True):
                assert torch.equal(getattr(cut_heads.teacher[level], side)[cut], own)
        for k, level in enumerate(cut_heads.levels):
            found = predictions(cut_heads.teacher[level])
            assert all(torch.equal(x, own[k]) for x, own in zip(found, wanted, strict=True))


@kinds
def test_the_teacher_goes_on_from_given_maps(kind, norm, dense_cfg, make_batch):
    teacher = build(dense_cfg(kind, norm), 1)
    heads = look(build(dense_cfg(kind, norm), 0), teacher, make_batch())
    weights = {name: x.clone() for name, x in teacher.head.state_dict().items()}
    for name, conv in product(("p4", "p7", "p3"), range(CONVS + 1)):
        level = heads.teacher[name]
        given = [x[Cut(conv)].clone().requires_grad_() for x in (level.class_maps, level.box_maps)]
        crossed = heads.cross(name, conv, *given)
        for found, wanted in zip(predictions(crossed), predictions(level), strict=True):
            assert torch.equal(found, wanted)
        sum(x.square().sum() for x in predictions(crossed)).backward()
        assert all(x.grad.abs().sum() > 0 for x in given)
    assert all(not p.requires_grad and p.grad is None for p in teacher.head.parameters())
    after = teacher.head.state_dict()
    assert all(torch.equal(after[name], x) for name, x in weights.items())
    # With norms of each level, maps of one level give something else on another.
    if norm == "BN":
        given = [x[Cut(1)] for x in (heads.teacher["p4"].class_maps, heads.teacher["p4"].box_maps)]
        other = heads.cross("p5", 1, *given)
        assert not torch.allclose(other.logits, heads.teacher["p4"].logits)


def test_gradients_of_crossing_are_those_of_the_equation(dense_cfg, make_batch):
    teacher = build(dense_cfg("FCOS", "BN", channels=4), 1).double()
    heads = look(build(dense_cfg("FCOS", "GN"), 0), teacher, make_batch())
    maps = [torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def crossed(*given):
        return tuple(predictions(heads.cross("p6", 1, *given)))

    assert torch.autograd.gradcheck(crossed, maps)


def test_what_is_not_touched_is_not_computed(dense_cfg, make_batch):
    teacher = build(dense_cfg("FCOS", "GN"), 1)
    calls = []
    for name, module in teacher.head.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *call, name=name: calls.append(name))
    cuts = [Cut(1, False), Cut(2)]
    heads = look(build(dense_cfg("FCOS", "GN"), 0), teacher, make_batch(), cuts)
    assert calls == []
    level = heads.teacher["p4"]
    before = level.class_maps[Cut(1, False)]
    assert calls == ["cls_subnet.0", "cls_subnet.1"]
    assert list(level.class_maps) == cuts and len(level.box_maps) == 2
    calls.clear()
    assert level.logits is heads.teacher["p4"].logits and level.class_maps[Cut(2)].numel()
    assert calls == [f"cls_subnet.{k}" for k in range(2, 6)] + ["cls_score"]
    assert level.class_maps[Cut(1, False)] is before
    calls.clear()
    assert len(level.centerness) == len(level.deltas) == 2
    assert calls == [f"bbox_subnet.{k}" for k in range(6)] + ["ctrness", "bbox_pred"]
    with pytest.raises(KeyError):
        level.class_maps[Cut(1)]  # not asked for when the method was built
    calls.clear()
    given = [x[Cut(2)] for x in (heads.student["p4"].class_maps, heads.student["p4"].box_maps)]
    assert heads.cross("p4", 2, *given).logits.requires_grad
    assert calls == ["cls_score"]


def test_maps_go_with_the_heads(dense_cfg, make_batch):
    """Without Python's collector, which may be long in coming."""
    gc.collect()
    gc.disable()
    try:
        heads = look(build(dense_cfg(), 0), build(dense_cfg(), 1), make_batch())
        level = heads.teacher["p3"]
        held = [level.logits, level.box_maps[Cut(1)], heads.student["p3"].class_maps[Cut(1, False)]]
        held.append(heads.cross("p3", 1, *(2 * [held[-1]])).deltas)
        heads.targets()
        held = [weakref.ref(x) for x in held]
        del heads, level
        assert [x() for x in held] == [None] * 4
    finally:
        gc.enable()


def test_a_record_is_handed_out_once_and_evaluation_keeps_none(dense_cfg, make_batch):
    model = build(dense_cfg(), 0)
    tap = HeadTap(model, [Cut(1)])
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()
    with EventStorage():
        model(make_batch())
        first = tap.pop()
        with pytest.raises(RuntimeError, match="taken"):
            tap.pop()
        model(make_batch(seed=1))
        model(make_batch())
        again = tap.pop()  # of the last forward
    for level, other in zip(first.levels, again.levels, strict=True):
        assert torch.equal(level.logits, other.logits)
        assert torch.equal(level.box_maps[Cut(1)], other.box_maps[Cut(1)])
    model.eval()(make_batch())
    assert tap._record == {}
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()


def truth(instances, anchors):
    """FCOS' sum of centerness by loops: its own rules of who is positive."""
    total = 0.0
    for boxes in (x.gt_boxes.tensor.tolist() for x in instances):
        for level, rows in enumerate(anchors):
            for x0, y0, x1, y1 in rows.tolist():
                size, x, y = x1 - x0, (x0 + x1) / 2, (y0 + y1) / 2
                low = 0 if level == 0 else 4 * size
                high = math.inf if level == len(anchors) - 1 else 8 * size
                best = None
                for left, top, right, bottom in boxes:
                    sides = x - left, y - top, right - x, bottom - y
                    near = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2))
                    fits = min(sides) > 0 and low < max(sides) < high
                    area = (right - left) * (bottom - top)
                    if fits and near < 1.5 * size and (best is None or area < best[0]):
                        best = area, sides
                if best:
                    a, b, c, d = best[1]
                    ratio = min(a, c) / max(a, c) * min(b, d) / max(b, d)
                    total += math.sqrt(ratio)
    return total


@pytest.mark.parametrize("empty", [(), (1,), (0, 1)], ids=["none", "one", "all"])
def test_targets_are_the_students_own_assignment(empty, dense_cfg, make_batch):
    for kind in ("RetinaNet", "FCOS"):
        student = build(dense_cfg(kind), 0)
        batch = make_batch()
        for k in empty:
            batch[k]["instances"] = batch[k]["instances"][:0]
        heads = look(student, build(dense_cfg(kind), 1), batch)
        targets = heads.targets()
        assert targets is heads.targets()
        instances = [x["instances"] for x in batch]
        anchors = [heads.anchors[name] for name in heads.levels]
        wanted, _ = student.label_anchors([Boxes(x) for x in anchors], instances)
        labels = torch.cat([targets.labels[name] for name in heads.levels], dim=1)
        assert torch.equal(labels, torch.stack(wanted))
        for name in heads.levels:
            count = heads.student[name].deltas.shape[1:].numel() // 4
            assert targets.labels[name].shape == (2, count) == (2, len(heads.anchors[name]))
        positive = (labels >= 0) & (labels < 3)
        assert [bool(x) for x in positive.any(1)] == [k not in empty for k in range(2)]
        factor = targets.average_factor.item()
        if kind == "FCOS":
            assert (labels >= 0).all()
            assert factor == pytest.approx(max(truth(instances, anchors), 1), rel=1e-5)
        else:
            assert (labels == -1).any() == (len(empty) < 2)
            overlap = [pairwise_iou(x.gt_boxes, Boxes(torch.cat(anchors))) for x in instances]
            for n, iou in enumerate(overlap):
                best = iou.max(0).values if len(iou) else torch.zeros(labels.shape[1])
                assert (labels[n][best < 0.4] != -1).all() and (labels[n][best > 0.5] >= 0).all()
            assert factor == sum(max(int(x), 1) for x in positive.sum(1))


def test_the_average_factor_is_a_mean_over_processes(monkeypatch):
    assert mean_over_processes(torch.tensor(3.0)) == 3
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(5.0))  # the other's
    value = torch.tensor(3.0)
    assert mean_over_processes(value) == 4 and value == 3


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_boxes_are_decoded_as_the_detectors_do(kind, dense_cfg, make_batch):
    cfg = dense_cfg(kind)
    cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS = (10.0, 8.0, 5.0, 4.0)
    student = build(cfg, 0)
    heads = look(student, build(cfg, 1), make_batch())
    anchors = heads.anchors["p4"]
    deltas = 20 * torch.randn(2, len(anchors), 4)  # sizes beyond the clamp, distances below 0
    found = heads.decode("p4", deltas)
    for own, rows in zip(found, deltas, strict=True):
        torch.testing.assert_close(own, student.box2box_transform.apply_deltas(rows, anchors))
    assert heads.decode("p4", deltas.double()).dtype == torch.float64
    assert heads.decode("p4", deltas.bfloat16()).dtype == torch.float32
    coder = student.box2box_transform
    small = deltas[:, :2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decode(coder, anchors[:2], x), small / 20)


def test_precisions(dense_cfg, make_batch):
    """The teacher's forward has its own; going on from the student's maps, the student's."""
    cfg, batch = dense_cfg(), make_batch()
    exact = look(build(cfg, 0), build(cfg, 1), batch)
    half = look(build(cfg, 0), build(cfg, 1), batch, precision="bfloat16")
    amp = look(build(cfg, 0), build(cfg, 1), batch, amp=True)
    assert half.teacher["p3"].logits.dtype == torch.bfloat16
    assert exact.teacher["p3"].logits.dtype == amp.teacher["p3"].logits.dtype == torch.float32
    wanted = exact.teacher["p3"].logits
    assert 0 < (half.teacher["p3"].logits.float() - wanted).norm() < 0.1 * wanted.norm()
    assert torch.equal(amp.teacher["p3"].logits, wanted)
    maps = [x[Cut(1)].float().requires_grad_() for x in (exact.teacher["p3"].class_maps,) * 2]
    for heads, dtype in ((exact, torch.float32), (half, torch.float32), (amp, torch.bfloat16)):
        assert heads.cross("p3", 1, *maps).logits.dtype == dtype
    (gradient,) = torch.autograd.grad(amp.cross("p3", 1, *maps).logits.float().sum(), maps[0])
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


def test_towers_of_another_form_are_not_read():
    conv, relu, norm = nn.Conv2d(1, 1, 3), nn.ReLU(), nn.GroupNorm(1, 1)
    steps = steps_of(nn.Sequential(conv, norm, relu, conv, relu))
    assert steps == [[conv, norm], [relu], [conv], [relu]]
    wrong = [(), (relu, conv), (conv,), (conv, conv), (conv, relu, norm, conv, relu), (norm, conv)]
    wrong += [(conv, nn.ReLU(inplace=True)), (conv, norm, nn.SiLU()), (conv, relu, relu, conv)]
    for modules in wrong:
        assert steps_of(nn.Sequential(*modules)) == [], modules
    assert [place_of(x) for x in CUTS] == [0, 1, 2, 3, 4] and place_of(Cut(0, False)) == 0


def test_pairs_that_cannot_be_compared_are_told_apart(dense_cfg, tiny_cfg):
    def built(**options):
        return build_model(dense_cfg(**options))

    student, wide = built(), built(channels=24)
    rcnn, points = build_model(tiny_cfg("GeneralizedRCNN")), build_model(reppoints(tiny_cfg))
    assert why_no_heads(student, wide) == why_no_heads(student, None) == ""
    assert why_no_heads(rcnn, wide) == (
        "the student, GeneralizedRCNN, has no plain head of RetinaNet or FCOS"
    )
    assert why_no_heads(student, points).startswith("the teacher, RepPoints, has no plain head")
    assert why_no_heads(student, built(kind="FCOS")) == (
        "family: the student has RetinaNet, the teacher FCOS"
    )
    assert why_no_heads(student, built(anchors=3)) == (
        "anchors per cell: the student has [2, 2, 2, 2, 2], the teacher [3, 3, 3, 3, 3]"
    )
    cfg = dense_cfg()
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    assert why_no_heads(student, build_model(cfg)) == "classes: the student has 3, the teacher 5"
    cfg = dense_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[9], [16], [32], [64], [128]]
    assert why_no_heads(student, build_model(cfg)).startswith("anchors around a cell: the student")
    cfg = dense_cfg()
    cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    assert why_no_heads(student, build_model(cfg)).startswith("weights of box deltas: the student")
    cfg = dense_cfg()
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64]]
    assert why_no_heads(student, build_model(cfg)) == (
        "levels of the head: the student has 5, the teacher 4"
    )


def test_towers_that_cannot_be_cut_are_told_apart(dense_cfg):
    student, wide = build_model(dense_cfg()), build_model(dense_cfg(channels=24))
    longer = build_model(dense_cfg(convs=3))
    for conv in range(CONVS + 1):
        assert why_no_heads(student, longer, {"AT": Cut(conv)}) == ""
        assert why_no_heads(student, wide, {"AT": Cut(conv)}) == (
            f"after convolution {conv} (AT) the student's towers are 16 channels wide, the "
            "teacher's 24"
        )
    for pair, who in (((student, longer), "student"), ((longer, student), "teacher")):
        assert why_no_heads(*pair, {"AT": Cut(3)}) == (
            f"maps are taken after convolution 3 (AT) of the towers, and the {who}'s have 2"
        )
    # What a head with a forward of its own computes is not known.
    odd = build_model(dense_cfg())
    odd.head.__class__ = type(
        "Odd", (RetinaNetHead,), {"forward": lambda *call: RetinaNetHead.forward(*call)}
    )
    assert family(odd) == "" and family(student) == "RetinaNet" and family(None) == ""


def test_grids_that_differ_are_named(dense_cfg, make_batch):
    cfg = dense_cfg()
    teacher = build(cfg, 1)
    frozen = FrozenTeacher(teacher, "BGR", "BGR", sources={}, keep=["head"])
    maps = {name: torch.zeros(1, 16, 4, 4) for name in frozen.head_levels}
    frozen.look = lambda *call: type("View", (), {"maps": {}, "outputs": maps})
    distiller = Distiller(
        student=build(cfg, 0),
        teacher=frozen,
        distillation=Method([], {}),
        sources={},
        asked_for=("teacher", "heads"),
    ).train()
    batch = make_batch([(64, 96)])
    with EventStorage():
        _, seen = distiller.run_student(batch)
    with pytest.raises(UserError, match="head on 'p3': the student's grid has 8x12 cells.*4x4"):
        distiller.batch(seen, batch)


@pytest.fixture
def headed():
    """A registered method that pulls class maps of the towers together."""

    @METHOD_REGISTRY.register()
    class Headed(Method):
        terms = ("pull",)
        needs = frozenset({"teacher", "heads"})

        @classmethod
        def add_config(cls, node):
            super().add_config(node)
            node.AT = 1

        @classmethod
        def cuts_of(cls, node):
            return {"AT": Cut(node.AT, False)}

        def forward(self, batch):
            heads, cut = batch.heads, Cut(1, False)
            sides = ((heads.student[k], heads.teacher[k]) for k in heads.levels)
            pull = [(s.class_maps[cut] - t.class_maps[cut]).square().mean() for s, t in sides]
            return {k: self.weigh({"pull": x}) for k, x in zip(heads.levels, pull, strict=True)}

    yield Headed
    METHOD_REGISTRY._obj_map.pop("Headed")


def test_a_config_wires_it(headed, dense_cfg, make_batch, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fgd.training.make_tiny_cfg", lambda *a, channels: dense_cfg())
    cfg = distilled(dense_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "Headed+FGD"
    model = build_model(cfg)
    assert list(model.teacher.parts) == ["backbone", "head"]
    batch = make_batch()
    batch[0]["instances"] = Instances((64, 96), **batch[0]["instances"][:0].get_fields())
    with EventStorage():
        losses = model(batch)
    assert list(model.table) == ["p3", "p4", "p5", "p6", "p7"]
    assert "headed_pull" in model.table["p7"] and "fgd_relation" in model.table["p7"]
    losses["loss_headed_pull"].backward()
    tower = model.student.head.cls_subnet
    assert tower[0].weight.grad.abs().sum() > 0 and tower[2].weight.grad is None
    assert next(model.student.backbone.bottom_up.parameters()).grad.abs().sum() > 0
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "distillation"}

    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.HEADED.AT = "Headed", 3
    with pytest.raises(UserError) as error:
        build_model(cfg)
    text = str(error.value)
    assert text.startswith(
        "MODEL.DISTILLER.METHOD Headed needs dense heads of one kind, with the same classes and "
        "anchors: maps are taken after convolution 3 (AT) of the towers, and the student's have "
        "2. These work here: "
    )
    assert "\n" not in text and "Headed" not in text.split("These work here")[1]
    assert needs.reasons(model.student, None, with_teacher=False).keys() == {
        "teacher",
        "region_logits",
        "region_deltas",
    }
