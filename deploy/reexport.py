"""Any graph of ours beside what exporting a checkpoint again gives: spec, weights, nodes."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import List

import onnx

from deploy.checks.inventory import take_inventory
from deploy.checks.weights import Comparison, compare_weights, other_nodes
from deploy.errors import UserError
from deploy.graphs import exportable
from deploy.graphs.common import ExportableDetector
from deploy.graphs.convert import RAW, THRESHOLD, to_onnx
from deploy.load import Student
from deploy.make_spec import make_spec
from deploy.reduced.half import half_model
from deploy.reduced.quantize import fold_batch_norms
from deploy.serving.graph_file import load_graph
from deploy.spec import ModelSpec

_IDENTITY = {"hashes", "versions", "format", "precision", "opset"}  # no promise to a client
_SHAPING = ("architecture", "task", "mask_size", "max_detections", "input_dtype", "dynamic")


@dataclass
class Graph:
    """A file as it is: its content parsed, and the spec in its metadata."""

    path: Path
    model: onnx.ModelProto
    spec: ModelSpec
    sha256: str


@dataclass
class Reference:
    """The same made from the checkpoint: its spec, the detector that was converted, the graph in
    float32, and in the precision of the file; of int8 that is float32 without batch norms, for its
    ranges are not in the checkpoint."""

    spec: ModelSpec
    detector: ExportableDetector
    single: onnx.ModelProto
    model: onnx.ModelProto


@dataclass
class Differences:
    """What of a graph is not the checkpoint's. `found` are reasons to refuse it, in the order in
    which they explain each other; `notes` are not."""

    weights: Comparison
    found: List[str]
    comparable: bool  # whether the checkpoint's model can judge the graph's predictions
    notes: List[str] = field(default_factory=list)

    def text(self) -> str:
        """Lines for a person."""
        head, *details = self.weights.lines()
        return "\n".join([head, *self.notes, *self.found, *details])


def read_graph(path) -> Graph:
    """Parse a file without running it.

    Raises:
        UserError: not there, no ONNX model, or none of ours.
    """
    content, model = load_graph(path)
    try:
        spec = ModelSpec.from_metadata({entry.key: entry.value for entry in model.metadata_props})
    except UserError as error:
        raise UserError(f"{path} was not written by deploy/export.py: {error}") from error
    return Graph(Path(path), model, spec, hashlib.sha256(content).hexdigest())


def make_reference(graph: Graph, student: Student) -> Reference:
    """What exporting the checkpoint with the graph's options gives.

    Raises:
        UserError: the graph's canvas does not suit the checkpoint's backbone.
    """
    spec, detector = graph.spec, exportable(student.model)
    size = None if spec.dynamic == "image" else (spec.height, spec.width)
    made = make_spec(student, detector, size, spec.dynamic, spec.input_dtype, filled=spec.filled)
    made = replace(made, opset=spec.opset, target=spec.target)
    single = model = to_onnx(detector, made)
    if spec.precision == "fp16":
        model = half_model(detector, replace(made, precision="fp16"), single)
    if spec.precision == "int8":
        model = fold_batch_norms(single)
    return Reference(made, detector, single, model)


def compare_graph(graph: Graph, reference: Reference) -> Differences:
    """All that can be told without running the graph.

    Raises:
        UserError: the .json beside the file cannot be read.
    """
    made, weights = reference.spec, compare_weights(graph.model, reference.model)
    found, notes, foreign = _sidecar(graph) + _specs(graph.spec, made), [], []
    # the nodes and ranges of int8 depend on images and recipe
    other = graph.spec.precision != "int8" and other_nodes(graph.model, reference.model)
    versions = [
        f"{name} {version}, not {made.versions.get(name)}"
        for name, version in graph.spec.versions.items()
        if version != made.versions.get(name)
    ]
    if versions:
        notes.append(f"exported by other versions than those here: {'; '.join(versions)}")
    if other and versions:
        notes.append(f"so nodes and constants were not compared: {other}")
        weights = weights.only(lambda name: name.startswith("student.") or name == THRESHOLD)
        foreign = take_inventory(reference.detector.student, graph.model).foreign_names
    found += weights.found()
    if foreign:
        found.append(f"weights of somebody else: {', '.join(foreign[:3])}")
    if other and not versions:
        found.append(f"other nodes: {other}")
    return Differences(weights, found, _same_predictions(graph, reference), notes)


def _sidecar(graph: Graph) -> List[str]:
    """What the .json beside the file says wrongly about it."""
    path = graph.path.with_suffix(".json")
    if not path.exists():
        return []
    beside = ModelSpec.from_json(path)
    expected = beside.hashes.pop("graph_sha256", "none")
    if expected != graph.sha256:
        return [
            f"{path.name} belongs to another file: it says SHA-256 {expected[:12]}..., the graph "
            f"has {graph.sha256[:12]}..."
        ]
    return [f"{path.name}, against the file: {text}" for text in beside.differences(graph.spec)]


def _specs(spec: ModelSpec, made: ModelSpec) -> List[str]:
    skipped = {name: getattr(made, name) for name in _IDENTITY}
    return [
        f"the file's metadata, against the checkpoint: {text}"
        for text in replace(spec, **skipped).differences(made)
    ]


def _same_predictions(graph: Graph, reference: Reference) -> bool:
    """Whether both have the same raw predictions, so that one can be judged by the other."""

    def shapes(model):
        return {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in model.graph.value_info
            if value.name.startswith(RAW)
        }

    spec, made = graph.spec, reference.spec
    return (
        all(getattr(spec, name) == getattr(made, name) for name in _SHAPING)
        and any(tensor.name == THRESHOLD for tensor in graph.model.graph.initializer)
        and len(spec.classes) == len(made.classes)
        and shapes(graph.model) == shapes(reference.single)
    )
