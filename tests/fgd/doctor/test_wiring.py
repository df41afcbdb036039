import copy

import pytest
import torch
from torch import nn

from fgd.doctor.wiring import check_frozen, check_optimizer


class Taught(nn.Module):
    """A student and a distillation module; the teacher is no submodule."""

    def __init__(self):
        super().__init__()
        self.student, self.distillation = nn.Linear(2, 2), nn.Linear(2, 2)


def frozen_teacher():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval().requires_grad_(False)


def thaw(teacher, model):
    teacher[0].bias.requires_grad_(True)


def wake(teacher, model):
    teacher[1].train()


def adopt(teacher, model):
    model.teacher = teacher


def drift(teacher, model):
    teacher[1].running_mean += 1


PLANTED = {
    thaw: "1 parameters require a gradient (0.bias",
    wake: "1 modules are in training mode (1,",
    adopt: "7 of its tensors are part of the trained model",
    drift: "1 tensors are not those of its file (1.running_mean",
}


def test_a_frozen_teacher_is_fine():
    teacher = frozen_teacher()
    model = Taught()
    finding = check_frozen(teacher, model, model, copy.deepcopy(teacher))
    assert finding.verdict == "ok" and finding.found.startswith("7 tensors as in the file")


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_teacher_that_is_not_frozen(plant):
    teacher, model = frozen_teacher(), Taught()
    original = copy.deepcopy(teacher)
    plant(teacher, model)
    finding = check_frozen(teacher, model, model, original)
    assert finding.verdict == "FAULT" and PLANTED[plant] in finding.found


def optimize(*modules):
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


def test_the_optimizer_has_all_that_is_trained_and_no_teacher():
    teacher, model = frozen_teacher(), Taught()
    rest = model, teacher, model.distillation

    def check(*modules):
        return check_optimizer(rest[0], optimize(*modules), *rest[1:])

    fine = check(model)
    assert fine.verdict == "ok"
    assert fine.found == "4 parameters, 2 of them of distillation modules, none of the teacher"
    left_out, taught = check(model.student), check(model, teacher)
    assert left_out.verdict == taught.verdict == "FAULT"
    assert "2 trainable parameters are not (distillation.weight, ...)" in left_out.found
    assert "4 parameters of the teacher are in it (0.weight, ...)" in taught.found
    model.distillation.requires_grad_(False)
    assert check(model.student).verdict == "ok", "what is not trained need not be there"
