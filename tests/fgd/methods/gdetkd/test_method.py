import copy
import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from fgd.config import get_fgd_cfg
from fgd.distillation.plan import make_plan
from fgd.doctor.losses import check_gradients, measure
from fgd.errors import UserError
from fgd.methods.batch import Level, Regions, RegionSizes, RegionView
from fgd.methods.gdetkd import GDetKD
from fgd.methods.gdetkd.method import localisation_term
from fgd.methods.method import METHOD_REGISTRY
from tests.fgd.distillation.test_distiller import cascade_mask, fcos, reppoints
from tests.fgd.methods.batches import make_batch
from tests.fgd.training import distilled
from tests.test_configs import built, read

from . import reference

LEVELS = [Level("p4", 4, 0, "", 16), Level("p3", 4, 0, "", 8)]
WEIGHTS = {"sgfi": 2.0, "ckd": 3.0, "reg": 0.5}
SIZES = RegionSizes(channels=3, cells=7, student_width=5, teacher_width=6, anchors=2)


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def make(weights=None, steps=2):
    torch.manual_seed(0)
    return GDetKD(LEVELS, {**WEIGHTS, **(weights or {})}, SIZES, 0.2, steps).double()


def batch_of(counts=(2, 3), classes=3, seed=0, dtype=torch.float64):
    total = sum(counts)
    corner = 20 + 10 * random(total, 2, seed=seed)
    boxes = torch.cat([corner, corner + 30], dim=1).float()
    views = [
        RegionView(features, random(total, width, seed=seed + 2 + n), *logits)
        for n, (features, width, logits) in enumerate(
            (
                (None, 5, (None, random(total, 4 * classes, seed=seed + 4))),
                (
                    random(total, 3, 7, 7, seed=seed + 5),
                    6,
                    (random(total, classes + 1, seed=6), random(total, 4 * classes, seed=7)),
                ),
            )
        )
    ]
    views = [RegionView(*(x if x is None else x.to(dtype) for x in view)) for view in views]
    regions = Regions(
        boxes=list(boxes.split(counts)),
        labels=torch.arange(total) % (classes + 1),
        targets=boxes,
        num_classes=classes,
        student=views[0],
        teacher=views[1],
        anchors=torch.arange(total) % 2,
    )
    sizes = {"p3": (8, 12), "p4": (4, 6)}
    student = {k: random(2, 4, *x, seed=seed + 8).to(dtype) for k, x in sizes.items()}
    return make_batch(student, {}, [torch.zeros(0, 4)] * 2, (64, 96), regions=regions)


def test_each_term_by_its_own_equation():
    method, given = make(), batch_of()
    regions, steps = given.regions, []
    for seed in (0, 20):
        given = batch_of(seed=seed)
        found = method(given)["regions"]
        regions = given.regions
        parameters = {k: v.detach() for k, v in method.named_parameters()}
        wanted = reference.sgfi(
            [given.student[k].numpy() for k in ("p3", "p4")],
            (8, 16),
            [x.double().tolist() for x in regions.boxes],
            regions.teacher.features.numpy(),
            {k.removeprefix("sgfi."): v.numpy() for k, v in parameters.items()},
        )
        assert found["sgfi"].item() == pytest.approx(2 * wanted, rel=1e-9)
        projected = [
            (parameters[f"projections.linear.{anchor}.weight"] @ row).tolist()
            for row, anchor in zip(regions.student.embedding, regions.anchors.tolist())
        ]
        teacher = regions.teacher.embedding.tolist()
        boxes = [x.double().tolist() for x in regions.boxes]
        wanted = reference.ckd(projected, teacher, boxes, steps, 0.2)
        assert found["ckd"].item() == pytest.approx(3 * wanted, rel=1e-9)
        steps += teacher
        parts = regions.student.deltas, regions.teacher.deltas, regions.teacher.logits
        wanted = reference.localisation(*(x.tolist() for x in parts))
        assert found["reg"].item() == pytest.approx(0.5 * wanted, rel=1e-9)
    assert len(steps) == 10 == sum(len(x) for x in method.memory.sets())


def test_localisation_by_hand():
    """Two classes and background, each with a third of the probability."""
    student = torch.zeros(1, 8, dtype=torch.float64)
    teacher = torch.tensor([[3.0, 0, 6, 1, -3, 3, 6, 2]], dtype=torch.float64)
    logits = torch.zeros(1, 3, dtype=torch.float64)
    assert localisation_term(student, teacher, logits).item() == pytest.approx(0 + 1 + 4 + 1)
    assert localisation_term(teacher, teacher, logits).item() == 0
    sure = torch.tensor([[-99.0, -99, 0]], dtype=torch.float64)  # of background
    assert localisation_term(student, teacher, sure).item() == pytest.approx(0)
    assert localisation_term(student[:0], teacher[:0], logits[:0]).item() == 0


def test_localisation_gradcheck():
    teacher, logits = random(4, 12), random(4, 4, seed=1)
    student = random(4, 12, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: localisation_term(x, teacher, logits), (student,))


def test_gradients_flow_into_the_student_and_the_modules_alone():
    method, given = make(), batch_of()
    regions = given.regions
    wanted = [*given.student.values(), regions.student.embedding, regions.student.deltas]
    fixed = [x for x in regions.teacher if x is not None]
    for x in (*wanted, *fixed):
        x.requires_grad_()
    value = sum(method(given)["regions"].values())
    inputs = [*wanted, *method.parameters()]
    found = torch.autograd.grad(value, inputs, retain_graph=True)
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in found)
    assert torch.autograd.grad(value, fixed, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("off", ["sgfi", "ckd", "reg"])
def test_a_weight_of_zero_leaves_a_term_out(off):
    method, given = make({off: 0.0}), batch_of()
    whole = make()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            parameter.copy_(whole.get_parameter(name))
    if off == "sgfi":
        given.student = {}
    if off == "ckd":
        given.regions.student = given.regions.student._replace(embedding=None)
    if off == "reg":
        given.regions.student = given.regions.student._replace(deltas=None)
    found, others = method(given)["regions"], whole(batch_of())["regions"]
    assert found.keys() == WEIGHTS.keys() - {off}
    assert all(torch.equal(value, others[name]) for name, value in found.items())
    assert (method.sgfi is None, method.memory is None) == (off == "sgfi", off == "ckd")


@pytest.mark.parametrize("counts", [(0, 3), (0, 0)], ids=["one", "all"])
def test_images_without_regions(counts):
    method, given = make(), batch_of(counts)
    for x in given.student.values():
        x.requires_grad_()
    found = method(given)["regions"]
    assert all(x.isfinite() and (x.item() == 0) == (sum(counts) == 0) for x in found.values())
    gradients = torch.autograd.grad(found["sgfi"], list(given.student.values()))
    assert all(x[0].abs().sum() == 0 for x in gradients)
    assert [len(x) for x in method.memory.sets()] == [sum(counts), 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    found = []
    for cast in (dtype, torch.float64):
        given = batch_of(dtype=dtype)
        given.student = {k: x.to(cast) for k, x in given.student.items()}
        for who in ("student", "teacher"):
            view = getattr(given.regions, who)
            cast_view = RegionView(*(x if x is None else x.to(cast) for x in view))
            setattr(given.regions, who, cast_view)
        method = make().to(torch.promote_types(cast, torch.float32))
        found.append(method(given)["regions"])
    for name, value in found[0].items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(found[1][name].item(), rel=1e-4)


def test_config():
    node = get_fgd_cfg().MODEL.DISTILLER.GDETKD
    assert dict(node) == {
        "SGFI_WEIGHT": 1.0,
        "CKD_WEIGHT": 0.5,
        "REG_WEIGHT": 0.0,
        "GAMMA": 0.07,
        "MEMORY_STEPS": 10,
    }
    every = {"teacher", "student_maps", "regions", "region_embeddings"}
    assert GDetKD.needs_of(node) == every
    node.REG_WEIGHT, node.SGFI_WEIGHT = 1.0, 0.0
    assert GDetKD.needs_of(node) == every - {"student_maps"} | {"region_deltas"}
    node.CKD_WEIGHT = 0.0
    assert GDetKD.needs_of(node) == {"teacher", "regions", "region_deltas"}


@pytest.mark.parametrize(
    "key, value, words",
    [("GAMMA", 0.0, "above 0"), ("GAMMA", float("inf"), "finite"), ("MEMORY_STEPS", -1, "below 0")],
)
def test_values_that_cannot_work_are_refused(key, value, words):
    cfg = get_fgd_cfg()
    node = cfg.MODEL.DISTILLER.GDETKD
    node[key] = value
    with pytest.raises(UserError, match=rf"MODEL\.DISTILLER\.GDETKD\.{key}: {value}.*{words}"):
        GDetKD.check_config(node, cfg)


def cascade(tiny_cfg):
    cfg = cascade_mask(tiny_cfg, 16)
    cfg.MODEL.MASK_ON = False
    return cfg


STUDENTS = {
    "Faster": lambda tiny: tiny("GeneralizedRCNN"),
    "Cascade": cascade,
    "RetinaNet": lambda tiny: tiny(),
    "FCOS": lambda tiny: fcos(tiny, 16),
}


def pair(cfg, folder, teacher="GeneralizedRCNN", **keys):
    cfg = distilled(cfg, folder, teacher)
    cfg.MODEL.DISTILLER.METHOD = "GDetKD"
    cfg.MODEL.DISTILLER.GDETKD.update(keys)
    return cfg


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_detector_learns_from_it(kind, tiny_cfg, tmp_path, make_batch):
    weight = float(kind == "Faster")
    cfg = pair(STUDENTS[kind](tiny_cfg), tmp_path, REG_WEIGHT=weight)
    if kind == "RetinaNet":
        cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    if kind == "Faster":
        cfg.MODEL.DISTILLER.LEVELS = ["p2", "p3", "p4", "p5", "p6"]
    model = build_model(cfg).train()
    anchors = 3 if kind == "RetinaNet" else 1
    assert len(model.distillation.projections.linear) == anchors
    counts = []
    for iteration in range(2):
        with EventStorage(iteration):
            losses = model(make_batch())
        own = {name: losses[name] for name in model.distillation.loss_names}
        assert list(own) == ["loss_gdetkd_sgfi", "loss_gdetkd_ckd", "loss_gdetkd_reg"]
        assert all(value.isfinite() for value in own.values())
        assert own["loss_gdetkd_sgfi"] > 0 and own["loss_gdetkd_ckd"] > 0
        assert (own["loss_gdetkd_reg"] > 0) == (weight > 0)
        counts.append([len(x) for x in model.distillation.memory.sets()][:2])
    assert counts[0][0] > 20 and counts[0][1] == 0 < counts[1][1]
    sum(own.values()).backward()
    for name, parameter in model.distillation.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    body = model.student.backbone.bottom_up
    assert sum(p.grad.abs().sum() for p in body.parameters() if p.grad is not None) > 0
    head = model.student.roi_heads.box_head if kind in ("Faster", "Cascade") else model.student.head
    parts = head[0] if kind == "Cascade" else getattr(head, "cls_subnet", head)
    model.zero_grad()
    with EventStorage(2):
        model(make_batch())["loss_gdetkd_ckd"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.parameters())
    states = model.student.state_dict()
    assert not any("memory" in name or "step_" in name for name in states)


@pytest.mark.parametrize("kind", ["Faster", "RetinaNet"])
def test_a_step_in_half_precision(kind, tiny_cfg, tmp_path, make_batch):
    """Under autocast, which does not reach the method; the backward pass computes again as it."""
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        cfg = pair(STUDENTS[kind](tiny_cfg), tmp_path, GAMMA=1.0)
        model = build_model(cfg).train()
        with EventStorage(0), torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = model(make_batch())
        own = [losses[name] for name in model.distillation.loss_names]
        sum(own).backward()
        assert all(x.dtype == torch.float32 for x in (*own, *model.distillation.memory.sets()))
        assert all(p.grad.isfinite().all() for p in model.distillation.parameters())
        found.append([value.item() for value in own])
    assert found[1] == pytest.approx(found[0], rel=0.2)


REFUSED = {
    "dense teacher": (
        lambda tiny: tiny(),
        "RetinaNet",
        {},
        "GDetKD needs vectors of boxes, by the heads of .* two-stage teacher "
        r"\(Faster, Mask or Cascade R-CNN\): the teacher, RetinaNet, has no RoI heads over a "
        "pyramid. These work here: .*FGD",
    ),
    "RepPoints": (
        lambda tiny: reppoints(tiny),
        "GeneralizedRCNN",
        {},
        "the student, RepPoints, has neither RoI heads over a pyramid nor a plain head of RetinaN",
    ),
    "deltas": (
        lambda tiny: tiny(),
        "GeneralizedRCNN",
        {"REG_WEIGHT": 1.0},
        "GDetKD needs box deltas of proposals, .*: the student, RetinaNet, has no RoI heads",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pairs_that_cannot_work_are_refused(name, tiny_cfg, tmp_path):
    student, teacher, keys, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as error:
        build_model(pair(student(tiny_cfg), tmp_path, teacher, **keys))
    assert "\n" not in str(error.value)
    assert not re.search(r"These work here: .*GDetKD", str(error.value))


def test_embeddings_have_to_be_vectors(tiny_cfg, tmp_path):
    cfg = tiny_cfg("GeneralizedRCNN")
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 0, 1
    cfg = pair(cfg, tmp_path)
    with pytest.raises(UserError, match="the student's box head ends in a map, not in a vector"):
        build_model(cfg)
    cfg.MODEL.DISTILLER.GDETKD.CKD_WEIGHT = 0.0
    build_model(cfg)


@pytest.mark.parametrize(
    "levels, words",
    [
        (["p3", "p9"], "the student has no level 'p9'; it has .*p3"),
        (["p3", "res4"], "'res4' is a stage of the backbone, or has other channels than 'p3'"),
    ],
)
def test_levels_that_cannot_work_are_refused(levels, words, tiny_cfg, tmp_path):
    cfg = pair(tiny_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.LEVELS = levels
    with pytest.raises(UserError, match=words):
        build_model(cfg)


def test_the_doctor_leaves_the_memory_as_it_was(tiny_cfg, tmp_path, make_batch):
    model = build_model(pair(tiny_cfg("GeneralizedRCNN"), tmp_path)).train()
    with EventStorage(0):
        model(make_batch())
    before = copy.deepcopy(model.distillation.memory.state_dict())
    measured = measure(model, [make_batch(), make_batch(seed=1)])
    assert check_gradients(measured).verdict == "ok"
    assert measured.levels.keys() == {"regions"}
    after = model.distillation.memory.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert len(after["step_0"]) > 20 and len(after["step_1"]) == 0


@pytest.mark.parametrize("name", ["frcnn", "retinanet", "fcos"])
def test_published_pairs_are_accepted(name):
    """Students of the COCO configs under the teacher that those name."""
    cfg = read(f"gdetkd_{name}")
    node = cfg.MODEL.DISTILLER
    assert node.TEACHER.CONFIG_FILE == read("fgd_frcnn").MODEL.DISTILLER.TEACHER.CONFIG_FILE
    with torch.device("meta"):
        plan = make_plan(cfg, built(name), built("frcnn", teacher=True))
    (levels,) = plan.levels.values()
    wanted = (4, 8, 16, 32, 64) if name == "frcnn" else (8, 16, 32, 64, 128)
    assert tuple(level.stride for level in levels) == wanted
    shapes = {k: tuple(v.shape) for k, v in plan.method.named_parameters()}
    width = 1024 if name == "frcnn" else 256
    count = 9 if name == "retinanet" else 1
    assert shapes["sgfi.adapt.weight"] == (256, 256, 1, 1)
    assert shapes["sgfi.embed.2.weight"] == (64, 128, 3, 3)
    projections = [v for k, v in shapes.items() if k.startswith("projections")]
    assert projections == [(1024, width)] * count
    assert (node.GDETKD.REG_WEIGHT > 0) == (name == "frcnn")


def test_it_is_registered_with_all_it_says():
    assert METHOD_REGISTRY.get("GDetKD") is GDetKD and issubclass(GDetKD, nn.Module)
    assert GDetKD.prefix() == "gdetkd"
