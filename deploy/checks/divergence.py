"""The first tensor in which two graphs part, found by running both with everything readable."""

from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from deploy.errors import UserError
from deploy.serving.bounded_run import run_session

_AT_ONCE = 64  # tensors fetched per run: all of a large graph would not fit into memory
_ROUNDINGS = 256  # of the tensor's largest value, where weights already differ by rounding


@dataclass(frozen=True)
class Divergence:
    """tensor: its name; node: what makes it; largest: absolute difference, None where dtype, shape
    or a whole number differs; scale: the reference's largest absolute value; initializers: what
    the node reads that does not depend on the images."""

    tensor: str
    node: str
    largest: Optional[float]
    scale: float
    initializers: List[str]

    def text(self) -> str:
        """One line."""
        size = "" if self.largest is None else f", by {self.largest:.3g} of {self.scale:.3g}"
        fed = f"; fed by {', '.join(self.initializers[:4])}" if self.initializers else ""
        return f"first diverging tensor: {self.tensor}, made by {self.node}{size}{fed}"


def first_divergence(
    model: onnx.ModelProto,
    reference: onnx.ModelProto,
    feed: Dict[str, np.ndarray],
    exact: bool = True,
) -> Optional[Divergence]:
    """Run both without optimisation and compare the tensors of equal names in the graph's order.

    Args:
        feed: the inputs.
        exact: equal weights give equal bits, so any difference counts; else rounding does not.
    Returns:
        The first one that differs; None if none does on these inputs.
    Raises:
        UserError: ONNX Runtime cannot run one of them.
    """
    known = {name for node in reference.graph.node for name in node.output}
    makers = {name: node for node in model.graph.node for name in node.output if name in known}
    names = list(makers)
    sessions = [_open(graph, names) for graph in (model, reference)]
    for start in range(0, len(names), _AT_ONCE):
        chunk = names[start : start + _AT_ONCE]
        results = [
            run_session(session, chunk, feed, "the graph node by node") for session in sessions
        ]
        for name, found, expected in zip(chunk, *results):
            if _differ(found, expected, exact):
                return _describe(name, makers[name], found, expected, model)
    return None


def _open(model: onnx.ModelProto, names: Sequence[str]) -> ort.InferenceSession:
    """A session whose outputs are all `names`, each computed as the graph says."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    # types are left to ONNX Runtime's own inference
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(copy.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # its exception classes share no base of their own
        raise UserError(f"ONNX Runtime cannot load the graph node by node: {error}") from error


def _differ(found: np.ndarray, expected: np.ndarray, exact: bool) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return True
    if exact or found.dtype.kind != "f":
        return not np.array_equal(found, expected, equal_nan=found.dtype.kind == "f")
    if not found.size:
        return False
    bound = _ROUNDINGS * np.finfo(found.dtype).eps * float(np.abs(expected).max())
    return not np.allclose(found, expected, rtol=0, atol=bound, equal_nan=True)


def _describe(name, node, found, expected, model: onnx.ModelProto) -> Divergence:
    largest, scale = None, 0.0
    if found.dtype.kind == "f" and found.shape == expected.shape:
        a, b = found.astype(np.float64), expected.astype(np.float64)
        with np.errstate(invalid="ignore"):
            largest = float(np.nan_to_num(np.abs(a - b), nan=np.inf).max(where=a != b, initial=0))
        scale = float(np.abs(b).max())
    fed = _constant_sources(node, model)
    return Divergence(name, f"{node.op_type} {node.name}".strip(), largest, scale, fed)


def _constant_sources(node: onnx.NodeProto, model: onnx.ModelProto) -> List[str]:
    """Initializers that a node reads itself or through nodes that read nothing but initializers."""
    sources = {tensor.name: [tensor.name] for tensor in model.graph.initializer}
    for other in model.graph.node:
        given = [name for name in other.input if name]
        if given and all(name in sources for name in given):
            found = [source for name in given for source in sources[name]]
            sources.update(dict.fromkeys(other.output, found))
    return list(dict.fromkeys(s for name in node.input for s in sources.get(name, [])))
