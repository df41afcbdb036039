import math

import pytest
import torch
from detectron2.layers import nms
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou

from fgd.config import get_fgd_cfg
from fgd.data.checks import NUM_CLASSES_KEYS
from fgd.detectors.reppoints import RepPoints
from fgd.detectors.reppoints.assign import assign_by_iou, assign_points
from fgd.distillation.levels import head_levels
from fgd.errors import UserError

LOSSES = {"loss_cls", "loss_box_init", "loss_box_refine"}


@pytest.fixture
def cfg():
    cfg = get_fgd_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "RepPoints"
    cfg.MODEL.BACKBONE.NAME = "build_reppoints_timm_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["res3", "res4", "res5"], 16
    cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.REPPOINTS.NUM_CLASSES, cfg.MODEL.REPPOINTS.NUM_CONVS = 3, 1
    return cfg


@pytest.fixture
def model(cfg):
    return build_model(cfg)


def test_published_architecture_from_the_config():
    cfg = get_fgd_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "RepPoints", "meta"
    cfg.MODEL.BACKBONE.NAME = "build_reppoints_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.NORM = "GN"
    with torch.device("meta"):
        model = build_model(cfg)
    head = {name: tuple(p.shape) for name, p in model.head.named_parameters()}
    assert head["cls_subnet.2.weight"] == head["refine_dcn.weight"] == (256, 256, 3, 3)
    assert head["init_points.weight"] == head["refine_points.weight"] == (18, 256, 1, 1)
    assert head["cls_score.weight"] == (80, 256, 1, 1) and "cls_dcn.bias" not in head
    assert model.head.cls_subnet[0].norm.num_groups == 32
    assert model.box2box_transform.moment.shape == (2,)
    assert model.strides == [8, 16, 32, 64, 128]
    assert (model.test_score_thresh, model.test_nms_thresh) == (0.05, 0.5)


def test_locations_are_the_top_left_corners_of_cells(model):
    anchors = model.anchor_generator([torch.zeros(1, 16, 2, 3)] * 5)
    centers = anchors[1].get_centers().tolist()
    assert centers == [[0, 0], [16, 0], [32, 0], [0, 16], [16, 16], [32, 16]]
    assert {tuple((a.tensor[:, 2] - a.tensor[:, 0]).tolist()) for a in anchors} == {
        (s,) * 6 for s in (8.0, 16, 32, 64, 128)
    }


def test_losses_follow_the_definition(model, make_batch):
    """Image by image and location by location, with points that are well spread."""
    torch.nn.init.normal_(model.head.init_points.bias, std=1.5)
    model.box2box_transform.moment.data = torch.tensor([0.3, 0.2])
    batch = make_batch([(64, 96), (96, 64), (64, 64)])
    batch[2]["instances"] = batch[2]["instances"][:0]
    model.train()
    losses = model(batch)
    with torch.no_grad():
        expected = literal_losses(model, batch)
    assert set(losses) == LOSSES and all(losses[name] > 0 for name in LOSSES)
    for name in LOSSES:
        torch.testing.assert_close(losses[name].double(), expected[name], rtol=1e-4, atol=0)


def literal_losses(model, batch):
    images = model.preprocess_image(batch).tensor
    features = model.backbone(images)
    levels = [features[name] for name in model.head_in_features]
    outputs = [
        [x.double().permute(0, 2, 3, 1).flatten(1, 2) for x in kind] for kind in model.head(levels)
    ]
    strides = [s for s, x in zip(model.strides, levels) for _ in range(x.shape[2] * x.shape[3])]
    places = [
        (j * s, i * s)
        for s, x in zip(model.strides, levels)
        for i in range(x.shape[2])
        for j in range(x.shape[3])
    ]
    sums, counts = dict.fromkeys(LOSSES, 0.0), {"init": 0, "refine": 0}
    for number, item in enumerate(batch):
        logits, first, refined = (torch.cat([x[number] for x in kind]) for kind in outputs)
        boxes, classes = item["instances"].gt_boxes.tensor, item["instances"].gt_classes
        candidates = torch.tensor([box_at(*x) for x in zip(first, places, strides, [model] * 999)])
        shapes = [tuple(x.shape[-2:]) for x in levels]
        nearest = assign_points(boxes, shapes, model.strides)
        overlapping = assign_by_iou(candidates, boxes)
        counts["init"] += max(int((nearest >= 0).sum()), 1)
        counts["refine"] += max(int((overlapping >= 0).sum()), 1)
        for r, (place, stride) in enumerate(zip(places, strides)):
            for name, points, owner in (
                ("loss_box_init", first, nearest[r]),
                ("loss_box_refine", refined, overlapping[r]),
            ):
                if owner >= 0:
                    box = box_at(points[r], place, stride, model)
                    for a, b in zip(box, boxes[owner].tolist()):
                        d = abs(a - b) / (4 * stride)
                        sums[name] += d * d / 0.22 if d < 0.11 else d - 0.055
            if overlapping[r] != -2:
                for k, logit in enumerate(logits[r].tolist()):
                    true = overlapping[r] >= 0 and classes[overlapping[r]] == k
                    p = 1 / (1 + math.exp(-logit))
                    p, alpha = (p, 0.25) if true else (1 - p, 0.75)
                    sums["loss_cls"] -= alpha * (1 - p) ** 2 * math.log(p)
    weights = {"loss_cls": 1 / counts["refine"], "loss_box_refine": 1 / counts["refine"]}
    weights["loss_box_init"] = 0.5 / counts["init"]
    return {n: torch.tensor(sums[n] * weights[n], dtype=torch.float64) for n in LOSSES}


def box_at(points, place, stride, model):
    ys, xs = points[0::2].tolist(), points[1::2].tolist()
    sides = []
    for values, moment, origin in zip((xs, ys), model.box2box_transform.moment.tolist(), place):
        mean = sum(values) / 9
        half = math.sqrt(sum((v - mean) ** 2 for v in values) / 8) * math.exp(moment)
        sides.append((origin + stride * (mean - half), origin + stride * (mean + half)))
    (x1, x2), (y1, y2) = sides
    return x1, y1, x2, y2


def test_images_without_boxes_are_background(model, make_batch):
    model.train()
    batch = make_batch()
    for item in batch:
        item["instances"] = item["instances"][:0]
    losses = model(batch)
    sum(losses.values()).backward()
    assert losses["loss_box_init"] == losses["loss_box_refine"] == 0 < losses["loss_cls"]
    # every parameter has a gradient, as training in several processes needs
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradients_are_finite_when_all_points_coincide(model, make_batch):
    """The deviation of equal points has no derivative."""
    for layer in (model.head.init_points, model.head.refine_points):
        torch.nn.init.zeros_(layer.weight)
    model.train()
    sum(model(make_batch()).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.head.init_points.bias.grad.any()


def test_giant_and_tiny_boxes_train(model):
    instances = Instances((64, 96))
    boxes = [[0.0, 0, 96, 64], [10, 10, 10.5, 60], [0, 0, 1e4, 1e4], [5, 5, 5, 5], [3, 3, 3.1, 3.1]]
    instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor(boxes)), torch.zeros(5).long()
    losses = model.train()([{"image": torch.rand(3, 64, 96) * 255, "instances": instances}])
    assert all(loss.isfinite() for loss in losses.values())


def test_it_trains_under_autocast(model, make_batch):
    model.train()
    losses = model(make_batch())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(make_batch())
        sum(half.values()).backward()
    assert all(loss.dtype == torch.float32 for loss in half.values())
    torch.testing.assert_close(half["loss_cls"], losses["loss_cls"], rtol=0.02, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_detections_follow_the_definition(model):
    """Class by class: threshold, best per level, clip, NMS; then the best of all."""
    torch.nn.init.normal_(model.head.init_points.bias, std=1.0)
    torch.nn.init.normal_(model.head.cls_score.weight, std=3.0)
    model.test_score_thresh, model.test_topk_candidates, model.max_detections_per_image = 0.01, 9, 8
    model.box2box_transform.moment.data.fill_(0.7)  # large boxes, of which much is outside
    image = torch.rand(3, 50, 90) * 255
    with torch.no_grad():
        (found,) = model.eval()([{"image": image}])
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        levels = [features[name] for name in model.head_in_features]
        logits, _, refined = model.head(levels)
    rows = []
    for level, points, stride in zip(logits, refined, model.strides):
        scored = [
            (score, k, i, j)
            for k, plane in enumerate(level[0].sigmoid().tolist())
            for i, line in enumerate(plane)
            for j, score in enumerate(line)
            if score > 0.01
        ]
        for score, k, i, j in sorted(scored, reverse=True)[:9]:
            x1, y1, x2, y2 = box_at(points[0, :, i, j], (j * stride, i * stride), stride, model)
            clipped = [min(max(x1, 0), 90), min(max(y1, 0), 50), min(max(x2, 0), 90)]
            rows.append((score, k, [*clipped, min(max(y2, 0), 50)]))
    kept = []
    for k in range(3):
        of_class = [row for row in rows if row[1] == k]
        boxes = torch.tensor([row[2] for row in of_class], dtype=torch.float32).view(-1, 4)
        scores = torch.tensor([row[0] for row in of_class])
        kept += [of_class[i] for i in nms(boxes, scores, 0.5)]
    expected = sorted(kept, reverse=True)[:8]
    expected = [row for row in expected if row[2][0] < row[2][2] and row[2][1] < row[2][3]]
    instances = found["instances"]
    assert len(rows) > len(kept) > 8 and len(instances) == len(expected) > 4
    assert instances.pred_classes.tolist() == [row[1] for row in expected]
    boxes = torch.tensor([row[2] for row in expected], dtype=torch.float32)
    torch.testing.assert_close(instances.pred_boxes.tensor, boxes, atol=1e-3, rtol=0)


def test_one_image_can_be_learnt_by_heart(cfg, make_batch):
    cfg.MODEL.TIMM.TOP_BLOCK = "none"
    cfg.MODEL.REPPOINTS.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    torch.manual_seed(0)
    model, batch = build_model(cfg).train(), make_batch([(64, 96)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=80)
    first = None
    for _ in range(80):
        losses = model(batch)
        first = first or {name: loss.item() for name, loss in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    assert all(loss < 0.3 * first[name] for name, loss in losses.items()), (first, losses)
    model.eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.train()  # with the statistics it was trained with
    with torch.no_grad():
        (found,) = model(batch)
    found, truth = found["instances"], batch[0]["instances"]
    for i, label in enumerate(truth.gt_classes):
        best = found[found.pred_classes == label][0]
        assert best.scores > 0.5 and pairwise_iou(best.pred_boxes, truth[i].gt_boxes) > 0.75


def test_wrong_norms_are_refused(cfg):
    cfg.MODEL.REPPOINTS.NORM = "BN"
    with pytest.raises(UserError, match="MODEL.REPPOINTS.NORM 'BN'"):
        build_model(cfg)


def test_the_rest_of_the_project_knows_it(cfg, model):
    assert type(model) is RepPoints
    cfg.MODEL.DISTILLER.STUDENT = "RepPoints"
    assert head_levels(cfg) == ["p3", "p4", "p5", "p6", "p7"]
    assert NUM_CLASSES_KEYS["RepPoints"] == "MODEL.REPPOINTS.NUM_CLASSES"
