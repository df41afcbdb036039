"""Regions are those that the student's second stage was trained on, and the teacher's view of them
is what its own head says of the same boxes."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from fgd.config import student_config
from fgd.distillation import needs
from fgd.distillation.distiller import Distiller
from fgd.distillation.regions import (
    RegionTap,
    view_of,
    why_no_region_deltas,
    why_no_region_logits,
    why_no_roi_heads,
)
from fgd.distillation.teacher import FrozenTeacher
from fgd.errors import UserError
from fgd.methods.method import METHOD_REGISTRY, Method

from ..training import distilled
from .test_distiller import cascade_mask


def region_distiller(tiny_cfg, student_cfg=None, teacher_cfg=None, needs=("regions",)):
    torch.manual_seed(0)
    student = build_model(student_cfg or tiny_cfg("GeneralizedRCNN"))
    model = build_model(teacher_cfg or tiny_cfg("GeneralizedRCNN", channels=24))
    teacher = FrozenTeacher(model, "BGR", "BGR", sources={}, keep=["roi_heads"])
    asked_for = ("teacher", *needs)
    return Distiller(
        student=student,
        teacher=teacher,
        distillation=Method([], {}),
        sources={},
        asked_for=asked_for,
    ), model


def look(distiller, batch):
    """The batch that a method would be given, and the proposals of the student's heads."""
    seen_proposals = []
    handle = distiller.student.roi_heads.register_forward_hook(
        lambda module, args, output: seen_proposals.extend(output[0])
    )
    distiller.train()
    with EventStorage():
        _, seen = distiller.run_student(batch)
    handle.remove()
    return distiller.batch(seen, batch), seen_proposals, seen.regions


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_they_are_the_sampled_proposals(kind, tiny_cfg, make_batch):
    cfg = cascade_mask(tiny_cfg, 16) if kind == "cascade" else tiny_cfg("GeneralizedRCNN")
    cfg.MODEL.MASK_ON = False
    distiller, _ = region_distiller(tiny_cfg, cfg)
    batch, proposals, recorded = look(distiller, make_batch())
    regions = batch.regions
    assert [len(x) for x in regions.boxes] == [len(x) for x in proposals]
    for own, wanted in zip(regions.boxes, proposals, strict=True):
        assert torch.equal(own, wanted.proposal_boxes.tensor) and not own.requires_grad
    assert torch.equal(regions.labels, torch.cat([x.gt_classes for x in proposals]))
    assert regions.positive.any() and not regions.positive.all()
    assert set(regions.labels.tolist()) <= {0, 1, 2, 3} and regions.num_classes == 3
    counts = [len(x) for x in regions.boxes]
    for targets, own in zip(regions.targets.split(counts), proposals, strict=True):
        assert torch.equal(targets, own.gt_boxes.tensor)
    assert regions.delta_weights == (10, 10, 5, 5)
    view, total = regions.student, len(regions.labels)
    assert view.features.shape == (total, 16, 7, 7) and view.embedding.shape == (total, 32)
    assert view.logits.shape == (total, 4)
    assert view.deltas.shape == (total, 4 if kind == "cascade" else 12)
    for part in view:
        (gradient,) = torch.autograd.grad(
            part.square().sum(), recorded.maps[0], retain_graph=True, allow_unused=True
        )
        assert gradient is not None and gradient.abs().sum() > 0


def test_the_teacher_sees_the_same_boxes(tiny_cfg, make_batch):
    distiller, model = region_distiller(tiny_cfg, teacher_cfg=cascade_mask(tiny_cfg, 24))
    batch, _, _ = look(distiller, make_batch())
    view = batch.regions.teacher
    model.eval()
    with torch.no_grad():
        images = model.preprocess_image(make_batch())
        outputs = model.backbone(images.tensor)
        boxes = [Boxes(x) for x in batch.regions.boxes]
        pooled = model.roi_heads.box_pooler([outputs[f"p{k}"] for k in range(2, 6)], boxes)
        embedding = model.roi_heads.box_head[0](pooled)
        logits, deltas = model.roi_heads.box_predictor[0](embedding)
    for found, wanted in zip(view, (pooled, embedding, logits, deltas), strict=True):
        assert torch.equal(found, wanted) and not found.requires_grad
    assert batch.teacher == {}


def test_images_without_objects(tiny_cfg, make_batch):
    distiller, _ = region_distiller(tiny_cfg)
    batch = make_batch()
    batch[1]["instances"] = batch[1]["instances"][:0]
    regions = look(distiller, batch)[0].regions
    count = len(regions.boxes[1])
    assert count > 0 and (regions.labels[-count:] == 3).all()
    assert torch.equal(regions.targets[-count:], regions.boxes[1])
    for sample in batch:
        sample["instances"] = sample["instances"][:0]
    regions = look(distiller, batch)[0].regions
    assert not regions.positive.any() and len(regions.labels) == len(regions.teacher.logits)


def test_a_record_is_handed_out_once_and_evaluation_keeps_none(tiny_cfg, make_batch):
    model = build_model(tiny_cfg("GeneralizedRCNN"))
    tap = RegionTap(model.roi_heads)
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()
    with EventStorage():
        model(make_batch())
    tap.pop()
    with pytest.raises(RuntimeError, match="were|was taken|taken"):
        tap.pop()
    model.eval()(make_batch())
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()


def test_no_boxes_at_all(tiny_cfg, make_batch):
    model = build_model(tiny_cfg("GeneralizedRCNN")).eval()
    with torch.no_grad():
        outputs = model.backbone(model.preprocess_image(make_batch()).tensor)
    view = view_of(model.roi_heads, outputs, [Boxes(torch.zeros(0, 4))] * 2)
    assert view.features.shape == (0, 16, 7, 7) and view.logits.shape == (0, 4)


def test_pairs_without_regions_are_told_apart(tiny_cfg):
    dense, rcnn = build_model(tiny_cfg()), build_model(tiny_cfg("GeneralizedRCNN"))
    assert why_no_roi_heads(rcnn, rcnn) == why_no_region_logits(rcnn, None) == ""
    assert "the student, RetinaNet, has no RoI heads" in why_no_roi_heads(dense, rcnn)
    assert "the teacher, RetinaNet, has no RoI heads" in why_no_region_logits(rcnn, dense)
    cfg = tiny_cfg("GeneralizedRCNN")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    assert why_no_region_logits(rcnn, build_model(cfg)) == (
        "the student distinguishes 3 classes, the teacher 5"
    )
    assert needs.reasons(dense, None, with_teacher=False).keys() == {
        "teacher",
        "region_logits",
        "region_deltas",
    }


def rcnn(tiny_cfg, **options):
    cfg = tiny_cfg("GeneralizedRCNN")
    for key, value in options.items():
        cfg.MODEL.ROI_BOX_HEAD[key] = value
    return cfg


def test_deltas_that_cannot_be_compared(tiny_cfg):
    plain = build_model(rcnn(tiny_cfg))
    agnostic = build_model(rcnn(tiny_cfg, CLS_AGNOSTIC_BBOX_REG=True))
    scaled = build_model(rcnn(tiny_cfg, BBOX_REG_WEIGHTS=(20.0, 20.0, 10.0, 10.0)))
    assert why_no_region_deltas(plain, plain) == why_no_region_deltas(scaled, None) == ""
    for pair, who in (((plain, agnostic), "teacher"), ((agnostic, plain), "student")):
        assert why_no_region_deltas(*pair).startswith(f"the {who} has deltas for all classes tog")
    assert why_no_region_deltas(plain, scaled) == (
        "the student scales them by BBOX_REG_WEIGHTS (10.0, 10.0, 5.0, 5.0), the teacher "
        "(20.0, 20.0, 10.0, 10.0)"
    )
    dense = build_model(tiny_cfg())
    assert "no RoI heads" in why_no_region_deltas(plain, dense)


@pytest.fixture
def regional():
    """A registered method that needs RoI logits."""

    @METHOD_REGISTRY.register()
    class Regional(Method):
        needs = frozenset({"teacher", "region_logits"})

    yield Regional
    METHOD_REGISTRY._obj_map.pop("Regional")


def test_a_method_that_cannot_work_is_refused_with_those_that_can(regional, tiny_cfg, tmp_path):
    cfg = distilled(tiny_cfg(), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "Regional"
    with pytest.raises(UserError) as error:
        build_model(cfg)
    text = str(error.value)
    assert text.startswith(
        "MODEL.DISTILLER.METHOD Regional needs RoI logits and box deltas of proposals, of the same "
        "classes: the student, RetinaNet, has no RoI heads over a pyramid. These work here: "
    )
    working = text.split("These work here: ")[1].split(", ")
    assert "\n" not in text and "FGD" in working and not {"Regional", "NKD"} & set(working)
    cfg = distilled(tiny_cfg("GeneralizedRCNN"), tmp_path)
    cfg.MODEL.DISTILLER.METHOD = "Regional"
    model = build_model(cfg)
    assert "roi_heads" in model.teacher.parts and "Regional (" in model.describe()
    assert not hasattr(build_model(student_config(cfg)), "distillation")


def test_padding_that_the_teacher_cannot_take_is_refused_without_maps_too(
    regional, tiny_cfg, tmp_path
):
    cfg = distilled(tiny_cfg("GeneralizedRCNN"), tmp_path)  # the teacher needs multiples of 32
    cfg.MODEL.DISTILLER.METHOD = "Regional"
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.TIMM.TOP_BLOCK = ["res2", "res3", "res4"], "none"
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32]]
    with pytest.raises(UserError, match="multiples of 16 pixels, the teacher needs multiples of 3"):
        build_model(cfg)
