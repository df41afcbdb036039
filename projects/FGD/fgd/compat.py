"""What differs between Detectron2 v0.6 and upstream main (which calls itself 0.6 as well).

Features are looked up, never version numbers. Each branch can go when its side is no longer
supported. Elsewhere the project uses only what both have in common.
"""

import importlib
import sys
import warnings
from importlib import resources
from types import ModuleType

import torch
import torch.distributed as dist
from detectron2 import modeling  # noqa: F401  before `_load_model_zoo`: all else that it imports
from detectron2.layers import deform_conv as d2_deform
from detectron2.solver import build as d2_solver
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import deform_conv2d


def _load_model_zoo() -> None:
    """Import ``detectron2.model_zoo``, which everybody has from then on, under any setuptools.

    main's wants ``resource_filename`` of pkg_resources, which setuptools 82 removed and 81 warns
    of. A module of that name with this one function is there for the length of the import only, so
    that a library which does without pkg_resources never meets half of one.
    """
    if "pkg_resources" in sys.modules:
        importlib.import_module("detectron2.model_zoo")
        return
    lent = sys.modules["pkg_resources"] = ModuleType("pkg_resources")
    lent.resource_filename = lambda package, name: str(resources.files(package).joinpath(name))
    try:
        importlib.import_module("detectron2.model_zoo")
    finally:
        del sys.modules["pkg_resources"]


_load_model_zoo()
# The anchor generators of both call torch.meshgrid without the argument that PyTorch will ask for.
warnings.filterwarnings("ignore", "torch.meshgrid")


def create_local_process_group(processes_per_machine: int) -> None:
    """Tell Detectron2 which ranks share this machine; every rank must call it once.

    main has a function for it. v0.6 leaves it to its own ``launch()``, which refuses to run without
    CUDA, and everything in ``comm`` that asks for a local rank fails until it is set.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    machine = comm.get_rank() // processes_per_machine
    for i in range(comm.get_world_size() // processes_per_machine):
        first = i * processes_per_machine
        group = dist.new_group(list(range(first, first + processes_per_machine)))
        if i == machine:
            comm._LOCAL_PROCESS_GROUP = group


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model itself in a single process, else its DistributedDataParallel.

    Detectron2's ``create_ddp_model`` always passes ``device_ids``, which CPU modules refuse.
    Buffers are not broadcast, as there: each rank keeps its own batch norm statistics.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = [comm.get_local_rank()] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def has_fast_coco_eval() -> bool:
    """Whether Detectron2's compiled COCO evaluation is there; a pure-Python build has none."""
    try:
        from detectron2.evaluation.fast_eval_api import COCOeval_opt  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def clip_types() -> tuple[str, ...]:
    """Values of SOLVER.CLIP_GRADIENTS.CLIP_TYPE that Detectron2's own solver understands."""
    return tuple(kind.value for kind in d2_solver.GradientClipType)


def backend_for(device: str) -> str:
    """Process group backend for a MODEL.DEVICE: NCCL between GPUs, gloo between CPU processes."""
    return "nccl" if torch.device(device).type == "cuda" else "gloo"


def lend_deform_conv() -> None:
    """Backbones with MODEL.RESNETS.DEFORM_ON_PER_STAGE on torchvision's operation, where
    Detectron2's own is not compiled.

    v0.6 then has layers that fail in the first forward on a GPU, and on a CPU in the first
    backward. Those of main cannot be built at all then, and say so themselves.
    """
    if not hasattr(getattr(d2_deform, "_C", None), "deform_conv_forward"):
        d2_deform.deform_conv, d2_deform.modulated_deform_conv = _deform_conv, _modulated


def _deform_conv(x, offset, weight, stride, padding, dilation, groups, deformable_groups):
    # torchvision reads both numbers of groups from the shapes; same for the next
    return deform_conv2d(x, offset, weight, None, stride, padding, dilation)


def _modulated(x, offset, mask, weight, bias, stride, padding, dilation, groups, deformable_groups):
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
