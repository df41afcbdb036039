from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from fgd.distillation.distiller import Distiller
from fgd.distillation.inherit import first_stage, heritage, inherit, neck_and_head
from fgd.errors import UserError
from tests.conftest import make_tiny_cfg

GOLDEN = Path(__file__).parents[2] / "golden" / "mtpd"
# MMDetection's names, beginning by beginning, and Detectron2's for the same modules.
NAMES = {
    "roi_head.bbox_head.0.fc_cls": "roi_heads.box_predictor.0.cls_score",
    "roi_head.bbox_head.1.fc_cls": "roi_heads.box_predictor.1.cls_score",
    "roi_head.bbox_head.2.fc_cls": "roi_heads.box_predictor.2.cls_score",
    "roi_head.bbox_head.0.fc_reg": "roi_heads.box_predictor.0.bbox_pred",
    "roi_head.bbox_head.1.fc_reg": "roi_heads.box_predictor.1.bbox_pred",
    "roi_head.bbox_head.2.fc_reg": "roi_heads.box_predictor.2.bbox_pred",
    "roi_head.bbox_head.0.shared_fcs.0": "roi_heads.box_head.0.fc1",
    "roi_head.bbox_head.1.shared_fcs.0": "roi_heads.box_head.1.fc1",
    "roi_head.bbox_head.2.shared_fcs.0": "roi_heads.box_head.2.fc1",
    "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
    "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
    "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc1",
    "rpn_head.rpn_cls": "proposal_generator.rpn_head.objectness_logits",
    "rpn_head.rpn_reg": "proposal_generator.rpn_head.anchor_deltas",
    "bbox_head.": "head.",
    "neck.": "backbone.fpn.",
    "backbone.": "backbone.bottom_up.",
}


class Detector(nn.Module):
    def __init__(self, channels=4, head="head"):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.Linear(3, channels)
        self.backbone.fpn_output3 = nn.Linear(channels, 4)
        self.add_module(head, nn.Linear(4, 2))


def test_copies_neck_and_head_and_nothing_else():
    teacher, student = Detector(), Detector()
    before = student.backbone.bottom_up.weight.clone()
    table = inherit(student, neck_and_head(teacher))
    torch.testing.assert_close(
        student.backbone.fpn_output3.weight, teacher.backbone.fpn_output3.weight
    )
    torch.testing.assert_close(student.head.bias, teacher.head.bias)
    torch.testing.assert_close(student.backbone.bottom_up.weight, before)
    assert "4 of 4 copied" in table
    assert student.head.weight.requires_grad


def test_reasons_are_given():
    teacher, student = Detector(channels=8), Detector(head="other")
    teacher.head.weight.data.fill_(float("nan"))  # not copied: the student has no "head"
    table = inherit(student, neck_and_head(teacher))
    assert "1 of 4 copied" in table  # fpn_output3.bias
    assert "skipped: teacher (4, 8), student (4, 4)" in table
    assert "skipped: the student has none" in table
    assert "kept: the teacher has none" in table


def test_nothing_to_copy_stops_with_the_table():
    teacher, student = Detector(channels=8), Detector(head="other")
    tensors = {k: v for k, v in neck_and_head(teacher).items() if "bias" not in k}
    with pytest.raises(UserError, match="(?s)no tensor.*0 of 2 copied"):
        inherit(student, tensors)


def test_copies_are_independent_of_the_teacher():
    teacher = Detector()
    tensors = neck_and_head(teacher)
    teacher.head.bias.data.fill_(9)
    assert (tensors["head.bias"] != 9).all()


def load_golden(name):
    """Teacher and what the authors' student takes of it, under Detectron2's names; K."""
    file = np.load(GOLDEN / f"{name}.npz")
    return *(unpack(file, side) for side in ("teacher", "inherited")), int(file["num_classes"])


def unpack(file, side):
    found, start = {}, 0
    for name, shape in zip(file[f"{side}_names"], file[f"{side}_shapes"]):
        shape = [int(n) for n in shape if n]  # padded with 0
        values = file[f"{side}_values"][start : start + int(np.prod(shape))]
        start += len(values)
        found[renamed(name.decode())] = torch.from_numpy(values.reshape(shape))
    assert start == len(file[f"{side}_values"])
    return found


def renamed(name):
    old = next(old for old in NAMES if name.startswith(old))
    return NAMES[old] + name[len(old) :]


class State:
    """As a module, only its state dict."""

    def __init__(self, tensors):
        self.state_dict = lambda: tensors


@pytest.mark.parametrize(("name", "count"), [("same_family", 4), ("cascade_boxes", 7)])
def test_golden_heritage(name, count):
    teacher, expected, classes = load_golden(name)
    found = neck_and_head(State(teacher))
    if name == "cascade_boxes":
        found = first_stage(found, classes)
    assert found.keys() == expected.keys() and len(found) == count
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def two_stage(cascade=False, agnostic=False, classes=3, channels=16):
    cfg = make_tiny_cfg("GeneralizedRCNN", channels)
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads" if cascade else "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = cascade or agnostic
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 1, 8
    return cfg


def test_a_plain_student_takes_the_first_stage_of_a_cascade():
    teacher, student = (build_model(two_stage(cascade)) for cascade in (True, False))
    table = inherit(student, heritage(teacher, student))
    assert "skipped" not in table and "kept" not in table
    own, theirs = student.roi_heads, teacher.roi_heads
    assert own.box_predictor.bbox_pred.weight.shape == (12, 32)
    for i in range(3):  # each class starts from the one box
        rows = own.box_predictor.bbox_pred.weight[4 * i : 4 * i + 4]
        torch.testing.assert_close(rows, theirs.box_predictor[0].bbox_pred.weight)
    # All that it says of a region is what the cascade's first stage says.
    features = torch.randn(5, 16, 7, 7)
    logits, deltas = own.box_predictor(own.box_head(features))
    expected = theirs.box_predictor[0](theirs.box_head[0](features))
    torch.testing.assert_close(logits, expected[0])
    torch.testing.assert_close(deltas, expected[1].repeat(1, 3))
    mask = "roi_heads.mask_head.predictor.weight"
    torch.testing.assert_close(student.state_dict()[mask], teacher.state_dict()[mask])


def test_one_box_for_all_classes_is_not_repeated():
    teacher, student = build_model(two_stage(cascade=True)), build_model(two_stage(agnostic=True))
    assert "skipped" not in inherit(student, heritage(teacher, student))
    torch.testing.assert_close(
        student.roi_heads.box_predictor.bbox_pred.bias,
        teacher.roi_heads.box_predictor[0].bbox_pred.bias,
    )


def test_a_cascade_student_takes_every_stage_and_other_families_are_as_before():
    teacher, student = (build_model(two_stage(cascade=True)) for _ in range(2))
    assert heritage(teacher, student).keys() == neck_and_head(teacher).keys()
    plain, dense = build_model(two_stage()), build_model(make_tiny_cfg("RetinaNet"))
    assert heritage(plain, student).keys() == neck_and_head(plain).keys()
    assert heritage(teacher, dense).keys() == neck_and_head(teacher).keys()


def test_other_classes_of_a_cascade_are_kept_and_said():
    teacher, student = build_model(two_stage(cascade=True)), build_model(two_stage(classes=5))
    table = inherit(student, heritage(teacher, student))
    assert "skipped: teacher (4, 32), student (6, 32)" in table  # of cls_score
    assert student.roi_heads.box_predictor.bbox_pred.weight.shape == (20, 32)
    torch.testing.assert_close(
        student.roi_heads.box_predictor.bbox_pred.bias,
        teacher.roi_heads.box_predictor[0].bbox_pred.bias.repeat(5),
    )


def test_a_distiller_decides_by_the_architecture_and_not_by_the_file(tmp_path):
    """The teacher's file is called anything; INHERIT is on."""
    teacher = two_stage(cascade=True, channels=16)
    model = build_model(teacher)
    torch.save({"model": model.state_dict()}, tmp_path / "anything.pth")
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    cfg = two_stage()
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    node = cfg.MODEL.DISTILLER
    node.STUDENT, node.METHOD, node.INHERIT = "GeneralizedRCNN", "", True
    node.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
    node.TEACHER.WEIGHTS = str(tmp_path / "anything.pth")
    distiller = Distiller(cfg)
    distiller.inherit_from_teacher()
    torch.testing.assert_close(
        distiller.student.roi_heads.box_head.fc1.weight, model.roi_heads.box_head[0].fc1.weight
    )
