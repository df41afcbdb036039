"""A graph as NVIDIA Triton Inference Server is told of it: config.pbtxt and labels.txt.

Needs what the runtime needs; Triton itself is not needed.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from deploy.errors import UserError
from deploy.runtime import GraphDetector
from deploy.serving.graph_file import read_graph_file
from deploy.spec import ModelSpec

SPEC_PARAMETER = "spec"  # of config.pbtxt: the ModelSpec's metadata, for clients
LABELS = "labels.txt"
DEFAULT_BATCH = 8
# what all versions of a model have in common, because clients prepare images by it
_SHARED = (
    "classes",
    "input_format",
    "min_size",
    "max_size",
    "size_divisibility",
    "dynamic",
    "filled",
)
_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8", "int32": "TYPE_INT32"}
KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


@dataclass
class ServedModel:
    """The files of one model.

    spec: of the graph;  tensors: the part of config.pbtxt that says what goes in and out;
    config: all of it;  labels: a class name per line;  graph: the file.
    """

    spec: ModelSpec
    tensors: str
    config: str
    labels: str
    graph: bytes


def served_model(
    model, name: str, max_batch_size: Optional[int] = None, instances: int = 1, device: str = "auto"
) -> ServedModel:
    """The files for a graph, checked against the graph itself.

    Args:
        model: .onnx file written by deploy/export.py.  name: of the model in Triton.
        max_batch_size: most images per run; None: 8, or 0 if the graph has batch 1 fixed.
        instances: copies that run at once, per device.  device: "auto", "cpu" or "gpu".
    Raises:
        UserError: no graph of ours, or its tensors are not those it describes; a name, number or
            class name that Triton cannot use; a batch size that the graph cannot run.
    """
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise UserError(f"model name {name!r}: use letters, digits, '_', '-' and '.'")
    if instances < 1:
        raise UserError(f"--instances is {instances}, expected 1 or more")
    detector = GraphDetector(model)  # compares every tensor's name, type and shape with the spec
    spec = detector.spec
    if any(len(label.splitlines()) != 1 for label in spec.classes):
        raise UserError(f"a class name is empty or has a line break: {spec.classes}")
    batch = _batch_size(spec, max_batch_size, model)
    tensors = _tensors(spec)
    return ServedModel(
        spec=spec,
        tensors=tensors,
        config=_service(name, batch, instances, device) + tensors + _spec_line(spec),
        labels="".join(f"{label}\n" for label in spec.classes),
        graph=read_graph_file(detector.path),
    )


def _batch_size(spec: ModelSpec, wanted: Optional[int], model) -> int:
    fixed = spec.dynamic == "none"
    if wanted is None:
        return 0 if fixed else DEFAULT_BATCH
    if fixed and wanted != 0:
        raise UserError(
            f"--max-batch-size {wanted}: {model} was exported with batch 1 fixed; leave the option "
            "out, or export with --dynamic batch"
        )
    if not fixed and wanted < 1:
        raise UserError(f"--max-batch-size is {wanted}, expected 1 or more for {model}")
    return wanted


def _tensors(spec: ModelSpec) -> str:
    """Inputs and outputs. Without the batch dimension where Triton batches, which is where the
    graph leaves it open."""
    interface, blocks = spec.interface(), []
    for kind in ("input", "output"):
        tensors = []
        for name, tensor in interface[f"{kind}s"].items():
            shape = tensor["shape"] if spec.dynamic == "none" else tensor["shape"][1:]
            dims = ", ".join(str(side) if isinstance(side, int) else "-1" for side in shape)
            label = f' label_filename: "{LABELS}"' if name == "labels" else ""
            dtype = _TYPES[tensor["dtype"]]
            tensors.append(f'  {{ name: "{name}" data_type: {dtype} dims: [ {dims} ]{label} }}')
        blocks.append(f"{kind} [\n" + ",\n".join(tensors) + "\n]\n")
    return "".join(blocks)


def _spec_line(spec: ModelSpec) -> str:
    """For clients. Without hashes and versions, which are a version's own."""
    metadata = json.dumps(replace(spec, hashes={}, versions={}).to_metadata())
    # json.dumps once more: of ASCII it makes what is a string in protobuf's text format, too
    value = f"value: {{ string_value: {json.dumps(metadata)} }}"
    return f'parameters: {{ key: "{SPEC_PARAMETER}" {value} }}\n'


def _served_spec(config: str) -> Optional[ModelSpec]:
    """What `_spec_line` put into a config.pbtxt; None if there is none or it cannot be read."""
    line = re.search(
        rf'key: "{SPEC_PARAMETER}" value: {{ string_value: (".*") }} }}$', config, re.M
    )
    try:
        return ModelSpec.from_metadata(json.loads(json.loads(line[1])))
    except (TypeError, ValueError):
        return None


def _service(name: str, max_batch_size: int, instances: int, device: str) -> str:
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch_size}",
        f"instance_group [ {{ count: {instances} kind: {KINDS[device]} }} ]",
    ]
    if max_batch_size > 1:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def fits(target: Path, served: ServedModel) -> bool:
    """Whether clients of the model at `target` would notice nothing but better detections."""
    try:
        config = (target / "config.pbtxt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    spec = _served_spec(config)
    return (
        spec is not None
        and served.tensors in config
        and all(getattr(spec, name) == getattr(served.spec, name) for name in _SHARED)
    )
