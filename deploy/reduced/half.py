"""float16: the network computes in half precision, everything around it in float32."""

import copy
from typing import Dict, List

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from deploy.errors import ParityError
from deploy.graphs.common import ExportableDetector
from deploy.graphs.convert import to_onnx
from deploy.spec import ModelSpec


def half_model(
    detector: ExportableDetector, spec: ModelSpec, single: onnx.ModelProto
) -> onnx.ModelProto:
    """The detector as a graph with typed float16 layers; no converter is needed afterwards.

    Args:
        detector: stays as it is.  spec: of the new file.
        single: the float32 graph. Its weights, rounded once, are the new graph's: the batch norms
            in them were folded in float32.
    Raises:
        ParityError: a weight is too large for float16, or the detector cannot be traced.
    """
    model = to_onnx(make_half(copy.deepcopy(detector)), spec)
    _take_weights(model, single)
    onnx.checker.check_model(model, full_check=True)
    return model


def make_half(detector: ExportableDetector) -> ExportableDetector:
    """Turn the parts with weights to float16, in place; they take and give float32.

    So normalisation, RoIAlign, decoding and NMS keep float32, in any architecture.
    """
    for part in network_parts(detector):
        part.half()
        part.register_forward_pre_hook(lambda _, args: _cast(args, torch.float16))
        part.register_forward_hook(lambda _, args, output: _cast(output, torch.float32))
    return detector


@torch.no_grad()
def network_parts(detector: ExportableDetector) -> List[nn.Module]:
    """The outermost modules with parameters that `detector.network` calls, in that order."""
    inside: List[nn.Module] = []
    found: Dict[nn.Module, None] = {}

    def enter(part, args):
        if not inside and any(True for _ in part.parameters()):
            found[part] = None
        inside.append(part)

    hooks = []
    for part in detector.modules():
        hooks.append(part.register_forward_pre_hook(enter))
        hooks.append(part.register_forward_hook(lambda part, args, output: inside.remove(part)))
    try:
        side = detector.square or 4 * detector.size_divisibility
        detector.network(torch.zeros(1, 3, side, side), torch.tensor([[side, side]]))
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


def _cast(value, dtype: torch.dtype):
    """Floating-point tensors anywhere inside, converted."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _take_weights(model: onnx.ModelProto, single: onnx.ModelProto) -> None:
    """Float16 initializers that the float32 graph has too become its values, rounded."""
    sources = {tensor.name: tensor for tensor in single.graph.initializer}
    for tensor in model.graph.initializer:
        source = sources.get(tensor.name)
        if tensor.data_type != onnx.TensorProto.FLOAT16:
            continue
        if source is not None and source.dims == tensor.dims:
            with np.errstate(over="ignore"):
                rounded = numpy_helper.to_array(source).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
        if not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise ParityError(f"{tensor.name} has values over 65504, the largest of float16")
