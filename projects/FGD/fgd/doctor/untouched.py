"""Run a model in training mode and leave no trace of it."""

from contextlib import contextmanager
from typing import Dict

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .. import rng
from ..checkpoint import loss_normalizers, student_of


@contextmanager
def untouched(model: nn.Module):
    """Inside, forwards in training mode are free; after it, the model is bit by bit as before.

    That is: buffers (batch norm's statistics), running numbers of foreground anchors, modes, all
    random number generators, and what a Distiller keeps of its last step. Parameters and their
    gradients are the caller's to leave alone: use torch.autograd.grad.

    Args:
        model: a plain detector or a Distiller, not wrapped.
    """
    buffers: Dict[str, Tensor] = {k: v.detach().clone() for k, v in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    student = student_of(model)
    normalizers = loss_normalizers(student)
    kept = {k: getattr(model, k) for k in ("schedule", "factor") if hasattr(model, k)}
    try:
        # TorchScript rewrites a function after its first calls, with other rounding: not for us.
        with rng.preserved(), EventStorage(0), torch.jit.optimized_execution(False):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for module, training in modes.items():
            module.training = training
        for name, value in normalizers.items():
            student.get_submodule(name).loss_normalizer = value
        for name, value in kept.items():
            setattr(model, name, value)
        if getattr(model, "distillation", None) is not None:
            model.distillation.level_totals = {}
