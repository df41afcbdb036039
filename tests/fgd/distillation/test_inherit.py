import pytest
import torch
from torch import nn

from fgd.distillation.inherit import inherit, neck_and_head
from fgd.errors import UserError


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
