"""Any graph of ours against any checkpoint: contract, weights, nodes, detections."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import List, Optional

import onnx

from deploy.checks.divergence import Divergence, first_divergence
from deploy.checks.graph_difference import Comparison, compare_initializers, structure_difference
from deploy.checks.inventory import take_inventory
from deploy.checks.quantized_weights import with_float_weights
from deploy.checks.verify_images import verification_batches
from deploy.errors import UserError
from deploy.graphs import exportable
from deploy.graphs.convert import RAW, THRESHOLD, to_onnx
from deploy.load import Student
from deploy.make_spec import make_spec
from deploy.reduced.half import half_model
from deploy.reduced.quantize import fold_batch_norms
from deploy.serving.graph_file import load_graph
from deploy.spec import INPUT_NAMES, ModelSpec

_SHOWN = 8  # differing initializers in a text
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
class Differences:
    """What of a graph is not the checkpoint's. `found` are reasons to refuse it, in the order in
    which they explain each other; `notes` are not."""

    found: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    weights: Optional[Comparison] = None
    divergence: Optional[Divergence] = None
    comparable: bool = True  # whether the checkpoint's model can judge the graph's predictions

    def text(self) -> str:
        """Lines for a person."""
        lines = [*self.notes, *self.found]
        if self.weights is not None:
            equal, total = self.weights.equal + self.weights.rounded, self.weights.total
            lines.insert(0, f"weights: {equal} of {total} initializers are the checkpoint's")
            lines += [f"  {x.text()}" for x in self.weights.differences[:_SHOWN]]
            more = len(self.weights.differences) - _SHOWN
            lines += [f"  and {more} more"] if more > 0 else []
        return "\n".join([*lines, *([self.divergence.text()] if self.divergence else [])])


@dataclass
class Reference:
    """The same made from the checkpoint: its spec, the graph in float32, and in the precision of
    the file; of int8 that is float32 too, for its ranges are not in the checkpoint."""

    spec: ModelSpec
    single: onnx.ModelProto
    model: onnx.ModelProto


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
        half = replace(made, precision="fp16")
        model = half_model(exportable(student.model), half, single)
    return Reference(made, single, model)


def compare_graph(graph: Graph, reference: Reference, student: Student) -> Differences:
    """All that can be told without Detectron2's inference, and where the tensors part.

    Raises:
        UserError: the .json beside the file cannot be read.
    """
    made, reference, result = reference.spec, reference.model, Differences()
    result.found += _sidecar(graph) + _contract(graph.spec, made)
    result.comparable = _same_predictions(graph, reference, made)
    if graph.spec.precision == "int8":  # its nodes and ranges depend on images and recipe
        reference = fold_batch_norms(reference)
        floats = with_float_weights(graph.model, reference)
        result.weights = compare_initializers(floats, reference)
        result.found += _weights(result.weights)
        return result
    structure = structure_difference(graph.model, reference)
    weights = compare_initializers(graph.model, reference, by_position=not structure)
    result.weights = weights
    if structure and not _same_exporter(graph.spec, made):
        result.notes.append(f"by another version of the exporter; its structure: {structure}")
        _keep_named(weights)
    result.found += _weights(weights) + _foreign(graph, student)
    if structure and _same_exporter(graph.spec, made):
        result.found.append(f"another structure: {structure}")
    if result.found and result.comparable:
        exact = not weights.rounded and not structure
        result.divergence = _divergence(graph, reference, exact)
    return result


def _divergence(graph: Graph, reference: onnx.ModelProto, exact: bool) -> Optional[Divergence]:
    """Of the first drawn batch that shows any, of one image and a ragged one."""
    batches = verification_batches(graph.spec)
    for batch in (batches[0], batches[-1]):
        feed = dict(zip(INPUT_NAMES, batch))
        found = first_divergence(graph.model, reference, feed, exact)
        if found is not None:
            return found
    return None


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


def _contract(spec: ModelSpec, made: ModelSpec) -> List[str]:
    skipped = {name: getattr(made, name) for name in _IDENTITY}
    return [
        f"the file's metadata, against the checkpoint: {text}"
        for text in replace(spec, **skipped).differences(made)
    ]


def _same_predictions(graph: Graph, reference: onnx.ModelProto, made: ModelSpec) -> bool:
    """Whether both have the same raw predictions, so that one can be judged by the other."""

    def shapes(model):
        return {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in model.graph.value_info
            if value.name.startswith(RAW)
        }

    names = {tensor.name for tensor in graph.model.graph.initializer}
    same = all(getattr(graph.spec, name) == getattr(made, name) for name in _SHAPING)
    return (
        same
        and THRESHOLD in names
        and len(graph.spec.classes) == len(made.classes)
        and shapes(graph.model) == shapes(reference)
    )


def _same_exporter(spec: ModelSpec, made: ModelSpec) -> bool:
    return spec.versions == made.versions


def _keep_named(weights: Comparison) -> None:
    """Forget the constants: another exporter numbers them in another way."""

    def named(name: str) -> bool:
        return name.startswith("student.") or name == THRESHOLD

    weights.differences = [x for x in weights.differences if named(x.name)]
    weights.missing = [name for name in weights.missing if named(name)]
    weights.extra = [name for name in weights.extra if named(name)]


def _weights(weights: Comparison) -> List[str]:
    found, count = [], len(weights.differences)
    if weights.other_weights:
        found.append(f"different weights: {count} of {weights.total} initializers differ")
    elif count:
        verb = "initializer differs" if count == 1 else "initializers differ"
        found.append(f"{count} {verb} from the checkpoint's: {weights.differences[0].name}")
    for names, text in (
        (weights.missing, "not in the graph"),
        (weights.extra, "in the graph, but not the checkpoint's"),
    ):
        if names:
            more = ", ..." if len(names) > 3 else ""
            found.append(f"{len(names)} initializers {text}: {', '.join(names[:3])}{more}")
    return found


def _foreign(graph: Graph, student: Student) -> List[str]:
    names = take_inventory(exportable(student.model).student, graph.model).foreign_names
    return [f"weights of somebody else: {', '.join(names[:3])}"] if names else []
