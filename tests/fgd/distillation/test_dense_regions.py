"""Regions of a dense student are boxes of its head, followed back to the cell that made each."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fgd.distillation import dense_regions
from fgd.distillation.dense_regions import (
    at_cells,
    best_boxes,
    label,
    propose,
    region_sizes,
    sample,
    tower_end,
    why_no_region_embeddings,
    why_no_regions,
)
from fgd.distillation.distiller import Distiller
from fgd.distillation.heads import HeadTap
from fgd.distillation.teacher import FrozenTeacher
from fgd.methods.batch import RegionSizes
from fgd.methods.method import Method

from ..methods.gdetkd.reference import iou
from .test_distiller import cascade_mask, fcos, reppoints

KINDS = ["RetinaNet", "FCOS"]


def student_of(kind, tiny_cfg):
    cfg = fcos(tiny_cfg, 16) if kind == "FCOS" else tiny_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0]]
    torch.manual_seed(1)
    model = build_model(cfg).train()
    with torch.no_grad():  # away from equal scores and boxes
        model.head.cls_score.weight.mul_(40)
        model.head.bbox_pred.weight.mul_(20)
    return model


def seen(model, batch):
    """What a tap records of a training forward, as one that a Distiller makes."""
    tap = HeadTap(model, [tower_end(model)])
    with EventStorage():
        model(batch)
    return tap.pop()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def decoded(model, box, deltas):
    """By the equations of Box2BoxTransform, or of the linear one on squares of a stride."""
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + width / 2, box[1] + height / 2
    if type(model).__name__ == "FCOS":
        left, top, right, bottom = (max(d, 0) * width for d in deltas)
        return [x - left, y - top, x + right, y + bottom]
    weights = model.box2box_transform.weights
    dx, dy, dw, dh = (d / w for d, w in zip(deltas, weights, strict=True))
    x, y = x + dx * width, y + dy * height
    width, height = width * math.exp(dw), height * math.exp(dh)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def reference_boxes(head, model, image, size, candidates, kept):
    """[(score, box, level, row)] of one image, best first, by loops."""
    chosen = []
    for k, (level, anchors) in enumerate(zip(head.levels, head.anchors, strict=True)):
        logits, deltas = level.logits[image].tolist(), level.deltas[image].tolist()
        classes, per_cell = model.num_classes, len(level.deltas[image]) // 4
        height, width = level.logits.shape[-2:]
        rows = []
        for y in range(height):
            for x in range(width):
                for a in range(per_cell):
                    score = max(logits[a * classes + c][y][x] for c in range(classes))
                    row = (y * width + x) * per_cell + a
                    own = [deltas[a * 4 + d][y][x] for d in range(4)]
                    box = decoded(model, anchors.tensor[row].tolist(), own)
                    limits = (size[1], size[0]) * 2
                    box = [min(max(v, 0), limit) for v, limit in zip(box, limits, strict=True)]
                    rows.append((score, box, k, row))
        rows.sort(key=lambda x: -x[0])
        left = []
        for row in rows[:candidates]:
            box = row[1]
            if box[2] > box[0] and box[3] > box[1]:
                if all(iou(box, other[1]) <= dense_regions.NMS_IOU for other in left):
                    left.append(row)
        chosen += left
    return sorted(chosen, key=lambda x: -x[0])[:kept]


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_equal_the_literal_reference(kind, tiny_cfg, make_batch, monkeypatch):
    monkeypatch.setattr(dense_regions, "CANDIDATES", 40)
    monkeypatch.setattr(dense_regions, "KEPT", 30)
    model = student_of(kind, tiny_cfg)
    sizes = [(64, 96), (50, 64)]
    head = seen(model, make_batch(sizes))
    for image, size in enumerate(sizes):
        boxes, levels, rows = best_boxes(head, model, image, size)
        wanted = reference_boxes(head, model, image, size, 40, 30)
        assert len(wanted) == 30 and len({x[2] for x in wanted}) > 1
        assert levels.tolist() == [x[2] for x in wanted] and rows.tolist() == [x[3] for x in wanted]
        wanted = torch.tensor([x[1] for x in wanted])
        torch.testing.assert_close(boxes, wanted, rtol=1e-4, atol=1e-3)


def test_boxes_that_are_not_finite_or_empty_are_left_out(tiny_cfg, make_batch):
    model = student_of("RetinaNet", tiny_cfg)
    head = seen(model, make_batch())
    for level in head.levels[:-1]:
        level.deltas.data.fill_(math.nan)
    head.levels[-1].logits.data.fill_(math.inf)
    for image in range(2):
        assert len(best_boxes(head, model, image, (64, 96))[0]) == 0
    instances = [x["instances"] for x in make_batch()]
    found = propose(head, model, instances, [(64, 96)] * 2, generator())
    assert [x.boxes.shape for x in found] == [(0, 4)] * 2
    regions = dense_regions.dense_regions(found, head, model, None)
    assert regions.student.embedding.shape == (0, 16) and len(regions.anchors) == 0
    assert not regions.positive.any()


def test_boxes_of_one_level_compete_those_of_others_do_not(tiny_cfg, make_batch):
    """As of an RPN. All boxes are the whole image, wherever they come from."""
    model = student_of("RetinaNet", tiny_cfg)
    head = seen(model, make_batch([(64, 96)]))
    for level in head.levels:
        level.deltas.data.copy_(torch.tensor([0.0, 0, 4, 4]).repeat(2)[None, :, None, None])
    boxes, levels, rows = best_boxes(head, model, 0, (64, 96))
    assert boxes.tolist() == [[0, 0, 96, 64]] * 5 and sorted(levels.tolist()) == [0, 1, 2, 3, 4]
    for level, row in zip(levels.tolist(), rows.tolist(), strict=True):
        logits = head.levels[level].logits[0]
        assert logits.unflatten(0, (2, 3)).amax(1).permute(1, 2, 0).argmax() == row


def objects(*boxes, classes):
    found = Instances((64, 96))
    found.gt_boxes, found.gt_classes = Boxes(torch.tensor(boxes)), torch.tensor(classes)
    return found


def test_labels_by_hand():
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [20, 20, 30, 30], [50, 50, 60, 60]]
    )
    rows = torch.arange(5)
    given = objects([0.0, 0, 10, 10], [20, 20, 30, 32], [50, 50, 70, 70], classes=[2, 0, 1])
    found = label(boxes, rows % 2, rows, given, num_classes=3)
    # IoU 1, 0.5, 0.49, 0.83 and 0.25: no box is an object just because it is an object's best.
    assert found.labels.tolist() == [2, 2, 3, 0, 3]
    assert found.targets[3].tolist() == [20, 20, 30, 32]
    none = label(boxes, rows % 2, rows, given[:0], num_classes=3)
    assert none.labels.tolist() == [3] * 5 and torch.equal(none.targets, boxes)


@pytest.mark.parametrize(
    "objects, background", [(300, 900), (10, 900), (300, 100), (0, 900), (3, 4), (0, 0)]
)
def test_as_many_are_sampled_as_detectron2_samples(objects, background):
    labels = torch.tensor([1] * objects + [3] * background + [-1] * 7)
    labels = labels[torch.randperm(len(labels))]
    rows = sample(labels, 3, generator())
    wanted = subsample_labels(labels, 512, 0.25, 3)
    assert [int((labels[rows] == y).sum()) for y in (1, 3)] == [len(x) for x in wanted]
    assert len(rows.unique()) == len(rows) <= 512 and not (labels[rows] < 0).any()
    if objects == 300:
        assert not torch.equal(rows, sample(labels, 3, generator(1)))
    assert torch.equal(rows, sample(labels, 3, generator()))


def test_cells_by_hand():
    maps = [torch.arange(2 * 3 * h * w).reshape(2, 3, h, w).float() for h, w in ((2, 4), (1, 1))]
    levels, images, cells = (torch.tensor(x) for x in ([0, 1, 0, 1], [1, 0, 0, 1], [5, 0, 7, 0]))
    found = at_cells([x.requires_grad_() for x in maps], levels, images, cells)
    wanted = [maps[0][1, :, 1, 1], maps[1][0, :, 0, 0], maps[0][0, :, 1, 3], maps[1][1, :, 0, 0]]
    assert torch.equal(found, torch.stack(wanted))
    found[:2].sum().backward()
    assert maps[0].grad.sum() == 3 == maps[0].grad[1, :, 1, 1].sum()
    assert maps[1].grad.sum() == 3 == maps[1].grad[0].sum()


def distiller_of(kind, tiny_cfg, teacher_cfg=None):
    student = student_of(kind, tiny_cfg)
    model = build_model(teacher_cfg or tiny_cfg("GeneralizedRCNN", channels=24))
    teacher = FrozenTeacher(model, "BGR", "BGR", sources={}, keep=["roi_heads"])
    asked_for = ("teacher", "regions")
    return Distiller(
        student=student,
        teacher=teacher,
        distillation=Method([], {}),
        sources={},
        asked_for=asked_for,
    ).train(), model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_distiller_gives_them_with_what_both_sides_make_of_them(kind, tiny_cfg, make_batch):
    distiller, model = distiller_of(kind, tiny_cfg, cascade_mask(tiny_cfg, 24))
    towers = []
    distiller.student.head.cls_subnet.register_forward_hook(lambda *call: towers.append(call[2]))
    batch = make_batch()
    torch.manual_seed(5)
    with EventStorage():
        _, recorded = distiller.run_student(batch)
        state = torch.get_rng_state()
        given = distiller.batch(recorded, batch, iteration=4)
        assert torch.equal(torch.get_rng_state(), state)  # the student's run must not notice
        again = distiller.batch(recorded, batch, iteration=4).regions
        other = distiller.batch(recorded, batch, iteration=5).regions
    assert given.heads is None and given.regions.student.features is None
    regions, total = given.regions, len(given.regions.labels)
    assert all(torch.equal(a, b) for a, b in zip(regions.boxes, again.boxes, strict=True))
    order = [x.boxes for x in (regions, other)]
    assert not all(torch.equal(a, b) for a, b in zip(*order, strict=True))
    assert 50 < total and [len(x) for x in (regions.targets, regions.anchors)] == [total] * 2
    for own, sample_ in zip(regions.boxes, batch, strict=True):
        height, width = sample_["image"].shape[-2:]
        assert not own.requires_grad and own.min() >= 0
        assert own[:, 2].max() <= width and own[:, 3].max() <= height
    assert set(regions.anchors.tolist()) == set(range(1 if kind == "FCOS" else 2))
    # Each vector is that of a cell and anchor from which the very box is decoded.
    image = torch.arange(2).repeat_interleave(torch.tensor([len(x) for x in regions.boxes]))
    rows, boxes = regions.student.embedding, torch.cat(regions.boxes)
    for r in range(0, total, 9):
        matched = False
        for k, tower in enumerate(towers):
            same = (tower[image[r]] == rows[r, :, None, None]).all(dim=0)
            level, per_cell = recorded.head.levels[k], 1 if kind == "FCOS" else 2
            for y, x in same.nonzero().tolist():
                anchor = int(regions.anchors[r])
                row = (y * tower.shape[-1] + x) * per_cell + anchor
                deltas = level.deltas[image[r], 4 * anchor : 4 * anchor + 4, y, x].tolist()
                anchor_box = recorded.head.anchors[k].tensor[row].tolist()
                box = decoded(distiller.student, anchor_box, deltas)
                clipped = Boxes(torch.tensor([box]))
                clipped.clip(tuple(batch[int(image[r])]["image"].shape[-2:]))
                matched |= torch.allclose(clipped.tensor[0], boxes[r], rtol=1e-4, atol=1e-3)
        assert matched, r
    (gradient,) = torch.autograd.grad(rows.square().sum(), towers[0])
    assert gradient.abs().sum() > 0
    view = regions.teacher
    with torch.no_grad():
        outputs = model.backbone(model.preprocess_image(batch).tensor)
        maps = [outputs[f"p{k}"] for k in range(2, 6)]
        pooled = model.roi_heads.box_pooler(maps, [Boxes(x) for x in regions.boxes])
    assert torch.equal(view.features, pooled) and view.embedding.shape == (total, 32)


def test_without_objects_all_is_background(tiny_cfg, make_batch):
    distiller, _ = distiller_of("RetinaNet", tiny_cfg)
    batch = make_batch()
    for sample_ in batch:
        sample_["instances"] = sample_["instances"][:0]
    with EventStorage():
        _, recorded = distiller.run_student(batch)
    regions = distiller.batch(recorded, batch).regions
    assert not regions.positive.any() and (regions.labels == 3).all() and len(regions.labels) > 50
    assert torch.equal(regions.targets, torch.cat(regions.boxes))


def test_which_pairs_have_them(tiny_cfg):
    dense, points = build_model(tiny_cfg()), build_model(reppoints(tiny_cfg))
    cfg = tiny_cfg("GeneralizedRCNN", channels=24)
    rcnn, cascade = build_model(cfg), build_model(cascade_mask(tiny_cfg, 16))
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 0, 1
    flat = build_model(cfg)
    for student in (dense, rcnn, cascade):
        for teacher in (None, rcnn, cascade):
            assert why_no_regions(student, teacher) == why_no_region_embeddings(student, teacher)
            assert why_no_regions(student, teacher) == ""
        assert why_no_regions(student, dense) == (
            "the teacher, RetinaNet, has no RoI heads over a pyramid"
        )
    for reason in (why_no_regions, why_no_region_embeddings):
        assert reason(points, rcnn) == (
            "the student, RepPoints, has neither RoI heads over a pyramid nor a plain head of "
            "RetinaNet or FCOS"
        )
    assert why_no_regions(dense, flat) == why_no_regions(flat, rcnn) == ""
    assert "the teacher's box head ends in a map" in why_no_region_embeddings(dense, flat)
    assert "the student's box head ends in a map" in why_no_region_embeddings(flat, rcnn)
    assert region_sizes(dense, cascade) == RegionSizes(16, 7, 16, 32, 1)
    assert region_sizes(rcnn, flat) == RegionSizes(24, 7, 32, 0, 1)
    cfg = tiny_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    assert region_sizes(build_model(cfg), rcnn).anchors == 3
