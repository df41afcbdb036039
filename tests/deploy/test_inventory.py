import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from deploy.checks.inventory import take_inventory
from deploy.graphs import exportable

from .conftest import ARCHITECTURES, make_cfg

COUNTED = ("kept", "folded", "redundant", "unused")


def initializer(name, array):
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_file_holds_the_student_and_nothing_else(arch, exported):
    made = exported(arch)
    model = onnx.load(made.path)
    found = take_inventory(exportable(made.model).student, model)
    tensors = [*made.model.parameters(), *made.model.buffers()]
    norms = [m for m in made.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert found.student == sum(t.numel() for t in tensors) > 300_000
    assert found.student == sum(getattr(found, name) for name in COUNTED)
    # weight, bias, mean and variance of each channel, and one counter
    assert found.folded == sum(4 * norm.num_features + 1 for norm in norms)
    assert found.biases == sum(norm.num_features for norm in norms)
    assert found.unused == 0 and found.redundant < 2000 and found.constants < 1000
    in_file = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    assert in_file == found.kept + found.biases + found.constants
    assert found.foreign_names == []


@pytest.fixture
def normed(tiny, export_tiny):
    """Name of a detector with group norms -> Exported."""

    def get(name):
        if name != "timm":
            return tiny(name)
        cfg = make_cfg("RetinaNet")
        cfg.MODEL.TIMM.NORM = cfg.MODEL.FPN.NORM = "GN"
        return export_tiny(cfg)

    return get


@pytest.mark.parametrize("name", ["FCOS", "RepPoints", "timm"])
def test_group_norms_and_box_factors_keep_their_names(name, normed):
    """The exporter computes constants from weights where it can, and gives them numbers."""
    made = normed(name)
    found = take_inventory(exportable(made.model).student, onnx.load(made.path))
    norms = [m for m in made.model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms and all(norm.weight.std() > 0.1 for norm in norms)
    assert found.unused_names == [] and found.foreign_names == []


def test_frozen_norms_are_folded_and_norms_per_level_kept(dynamic_retinanet):
    model = onnx.load(dynamic_retinanet.path)
    found = take_inventory(exportable(dynamic_retinanet.model).student, model)
    assert found.folded >= 4 * 4 * 16 and found.biases == 4 * 16  # ToyBody's four stages
    left = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert len(left) == 2 * 3  # one convolution in each of two subnets, three levels


def test_every_kind_of_tensor_is_told_apart():
    student = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.Linear(4, 5, bias=False)
    )
    student.register_buffer("twin", student[0].weight.detach().clone())
    student.register_buffer("idle", torch.arange(7.0))
    torch.nn.init.zeros_(student[0].bias)
    model = onnx.ModelProto()
    model.graph.initializer.extend(
        [
            initializer("student.0.weight", student[0].weight.detach()),
            initializer("student.2.weight", student[2].weight.detach()),
            initializer("student.0.weight_bias", np.arange(2)),
            initializer("fill", np.full(100, -1e30)),
            initializer("adapter", np.arange(100) / 7),
            initializer("positions", np.arange(-1, 99)),
        ]
    )
    found = take_inventory(student, model)
    assert (found.kept, found.folded, found.redundant, found.unused) == (26, 9, 8, 7)
    assert (found.biases, found.constants) == (2, 300)
    assert found.unused_names == ["idle"] and found.foreign_names == ["adapter"]
    assert "26 kept + 9 batch norm" in found.text() and found.to_dict()["kept"] == 26
