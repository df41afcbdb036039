import sys
from types import ModuleType

import detectron2
import pytest
import torch
from detectron2.layers import deform_conv as d2_deform
from detectron2.solver import build as d2_solver
from detectron2.utils import comm
from torch import nn

from fgd import compat


@pytest.fixture
def main_zoo(monkeypatch, tmp_path):
    """A ``detectron2.model_zoo`` that finds its files as main's does, and is not imported yet."""
    text = "import pkg_resources\n\ndef get_config_file(name):\n"
    text += "    return pkg_resources.resource_filename('detectron2.model_zoo', name)\n"
    (tmp_path / "model_zoo").mkdir()
    (tmp_path / "model_zoo" / "__init__.py").write_text(text)
    monkeypatch.setattr(detectron2, "__path__", [str(tmp_path), *detectron2.__path__])
    monkeypatch.setattr(detectron2, "model_zoo", None)
    for name in [name for name in sys.modules if name.startswith("detectron2.model_zoo")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "model_zoo"


def test_the_zoo_of_main_loads_without_pkg_resources(main_zoo, monkeypatch):
    """setuptools 82 has none. Nobody else meets the stand-in, which has one function only."""
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    compat._load_model_zoo()
    assert "pkg_resources" not in sys.modules
    from detectron2 import model_zoo

    found = model_zoo.get_config_file("configs/COCO-Detection/x.yaml")
    assert found == str(main_zoo / "configs" / "COCO-Detection" / "x.yaml")


def test_a_zoo_that_cannot_be_imported_leaves_no_stand_in(main_zoo, monkeypatch):
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    (main_zoo / "__init__.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        compat._load_model_zoo()
    assert "pkg_resources" not in sys.modules


def test_pkg_resources_of_others_is_left_alone(main_zoo, monkeypatch):
    own = ModuleType("pkg_resources")
    own.resource_filename = lambda package, name: f"own {name}"
    monkeypatch.setitem(sys.modules, "pkg_resources", own)
    compat._load_model_zoo()
    assert sys.modules["pkg_resources"] is own
    assert sys.modules["detectron2.model_zoo"].get_config_file("x") == "own x"


def test_local_group_on_v06_is_the_ranks_of_this_machine(monkeypatch):
    """Rank 5 of two machines with four processes each."""
    groups = []
    monkeypatch.setattr(comm, "create_local_process_group", None, raising=False)
    monkeypatch.delattr(comm, "create_local_process_group")
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    monkeypatch.setattr(comm, "get_rank", lambda: 5)
    monkeypatch.setattr(comm, "get_world_size", lambda: 8)
    monkeypatch.setattr(compat.dist, "new_group", lambda x: groups.append(x) or tuple(x))
    compat.create_local_process_group(4)
    # Making a group is collective: every rank makes all of them and keeps its own.
    assert groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert comm._LOCAL_PROCESS_GROUP == (4, 5, 6, 7)


def test_local_group_on_main_is_left_to_detectron2(monkeypatch):
    calls = []
    monkeypatch.setattr(comm, "create_local_process_group", calls.append, raising=False)
    compat.create_local_process_group(4)
    assert calls == [4]


@pytest.mark.parametrize("there", [True, False])
def test_fast_coco_eval_is_used_only_where_it_was_compiled(monkeypatch, there):
    module = ModuleType("fast_eval_api")
    if there:
        module.COCOeval_opt = object
    monkeypatch.setitem(sys.modules, "detectron2.evaluation.fast_eval_api", module)
    assert compat.has_fast_coco_eval() is there


def test_clip_types_are_detectron2s(monkeypatch):
    assert set(compat.clip_types()) >= {"value", "norm"}
    extended = d2_solver.Enum("GradientClipType", {"VALUE": "value", "FULL": "full_model"})
    monkeypatch.setattr(d2_solver, "GradientClipType", extended)
    assert compat.clip_types() == ("value", "full_model")


@pytest.mark.parametrize(("device", "ids"), [("cpu", None), ("cuda:1", [1])])
def test_ddp_gets_device_ids_only_on_cuda(monkeypatch, device, ids):
    class Recorder(nn.Module):
        def __init__(self, model, **kwargs):
            super().__init__()
            self.module, self.kwargs = model, kwargs

    class Model(nn.Module):
        def parameters(self):
            return iter([torch.empty(0, device="meta")])

    model = Model()
    assert compat.wrap_ddp(model) is model and compat.unwrap(model) is model
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 1)
    monkeypatch.setattr(compat, "DistributedDataParallel", Recorder)
    tensor = type("Tensor", (), {"device": torch.device(device)})
    monkeypatch.setattr(Model, "parameters", lambda self: iter([tensor]))
    wrapped = compat.wrap_ddp(model)
    assert wrapped.kwargs == {"device_ids": ids, "broadcast_buffers": False}
    assert compat.unwrap(wrapped) is model


def test_backend_follows_the_device():
    assert compat.backend_for("cpu") == "gloo" and compat.backend_for("cuda:0") == "nccl"


@pytest.fixture
def deformable(monkeypatch):
    """Detectron2's two layers in float64 with what their block gives them; nothing is compiled."""
    monkeypatch.setattr(d2_deform, "_C", ModuleType("_C"), raising=False)
    for name in ("deform_conv", "modulated_deform_conv"):
        monkeypatch.setattr(d2_deform, name, getattr(d2_deform, name))
    compat.lend_deform_conv()
    options = {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": 2}
    layers = [
        kind(4, 6, deformable_groups=2, bias=False, **options).double()
        for kind in (d2_deform.DeformConv, d2_deform.ModulatedDeformConv)
    ]
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    offset = torch.randn(2, 2 * 18, 5, 4, dtype=torch.float64)
    return layers, x, offset, torch.rand(2, 2 * 9, 5, 4, dtype=torch.float64)


def test_deformable_layers_run_on_torchvisions_operation(deformable):
    """Two groups, two groups of offsets; zero offsets are a plain convolution; with gradients."""
    (plain, modulated), x, offset, mask = deformable
    assert plain(x, offset).shape == (2, 6, 5, 4)
    torch.testing.assert_close(modulated(x, offset, torch.ones_like(mask)).shape, (2, 6, 5, 4))
    for layer, rest in ((plain, ()), (modulated, (torch.ones_like(mask),))):
        expected = nn.functional.conv2d(x, layer.weight, None, 2, 2, 2, 2)
        torch.testing.assert_close(layer(x, torch.zeros_like(offset), *rest), expected)
    modulated(x, offset.requires_grad_(), mask).square().sum().backward()
    assert modulated.weight.grad.any() and offset.grad.any()


def test_a_compiled_detectron2_keeps_its_own_deformable_convolution(monkeypatch):
    own = object()
    monkeypatch.setattr(d2_deform, "_C", ModuleType("_C"))
    d2_deform._C.deform_conv_forward = None
    monkeypatch.setattr(d2_deform, "deform_conv", own)
    compat.lend_deform_conv()
    assert d2_deform.deform_conv is own
