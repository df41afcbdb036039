"""Run a model in training mode and leave no trace of it."""

from contextlib import contextmanager

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ..processes import rng

_PLAIN = (bool, int, float, str, tuple)


def _plain(module: nn.Module) -> dict:
    """Plain attributes: the mode, running numbers that are no buffers, a Distiller's schedule and
    its table of terms, which each step makes anew."""
    return {
        k: v
        for k, v in vars(module).items()
        if isinstance(v, _PLAIN) or isinstance(v, dict) and not k.startswith("_")
    }


@contextmanager
def untouched(model: nn.Module):
    """Inside, forwards in training mode are free; after it, the model is bit by bit as before.

    That is: buffers (batch norm's statistics), plain attributes of every module (its mode, the
    running number of foreground anchors by which RetinaNet and FCOS divide their losses), and the
    random number generators. Parameters and their gradients are the caller's to leave alone: use
    torch.autograd.grad.

    Args:
        model: a plain detector or a Distiller, not wrapped.
    """
    # A step may also put another tensor, of another shape, in a buffer's place.
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    attributes = {module: _plain(module) for module in model.modules()}
    try:
        # TorchScript rewrites a function after its first calls, with other rounding: not for us.
        with rng.preserved(), EventStorage(0), torch.jit.optimized_execution(False):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer.copy_(before))
        for module, before in attributes.items():
            for name in _plain(module).keys() - before.keys():
                delattr(module, name)  # some come into being with the first step
            vars(module).update(before)
