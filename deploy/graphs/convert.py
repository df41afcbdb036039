"""Exportable module -> ONNX model: traced, stripped of everything that is not the detector."""

import warnings
from typing import Tuple

import onnx
import torch
from torch.export import Dim

from deploy.errors import ParityError
from deploy.graphs.common import FEATURES, ExportableDetector
from deploy.graphs.ops import TRANSLATIONS
from deploy.graphs.tensorrt.static_ops import STATIC_TRANSLATIONS
from deploy.spec import INPUT_NAMES, OUTPUT_NAMES, ModelSpec

OPSET = 18
RAW = "raw."  # prefix of the values inside the graph that `expose_raw` can make outputs
THRESHOLD = "score_threshold"  # name of the initializer


def to_onnx(detector: ExportableDetector, spec: ModelSpec) -> onnx.ModelProto:
    """Trace the detector and return the finished model, metadata included.

    The raw predictions of `detector.network` keep names of their own ("raw.…") inside the graph.
    `detector.static` and `detector.area.filled` are set as the spec wants them.

    Raises:
        ParityError: the backbone or a head uses an operator that has no ONNX translation.
    """
    detector.static = spec.target == "tensorrt"
    detector.area.filled = spec.filled or detector.square > 0
    example = _example(detector, spec)
    with torch.no_grad():
        raw = detector.network(*example)
    raw_names = [RAW + name for name in raw if name not in OUTPUT_NAMES]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, about its own internals
            program = torch.onnx.export(
                detector,
                example,
                dynamo=True,
                opset_version=spec.opset,
                external_data=False,
                input_names=INPUT_NAMES,
                output_names=[*spec.output_names, *raw_names],
                dynamic_shapes=_dynamic_shapes(spec),
                custom_translation_table=STATIC_TRANSLATIONS if detector.static else TRANSLATIONS,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ParityError(
            f"torch.onnx cannot convert this {spec.architecture} ({reason}); --debug shows where"
        ) from error
    model = program.model_proto
    _strip(model)
    onnx.helper.set_model_props(model, spec.to_metadata())
    onnx.checker.check_model(model, full_check=True)
    return model


def _example(detector, spec: ModelSpec) -> Tuple[torch.Tensor, torch.Tensor]:
    """Inputs to trace with. Batch 2 and at least 3 cells on the coarsest level where sizes are
    dynamic: torch.export takes a size of 1 for a constant."""
    height, width = spec.height, spec.width
    if spec.dynamic == "image":
        coarsest = max(s.stride for s in detector.student.backbone.output_shape().values())
        height = width = 3 * max(coarsest, spec.size_divisibility)
    batch = 1 if spec.dynamic == "none" else 2
    images = torch.zeros(batch, 3, height, width, dtype=getattr(torch, spec.input_dtype))
    return images, torch.tensor([[height, width]] * batch, dtype=torch.int32)


def _dynamic_shapes(spec: ModelSpec):
    if spec.dynamic == "none":
        return None
    batch = Dim("batch", min=1)
    if spec.dynamic == "batch":
        return {0: batch}, {0: batch}
    step = spec.size_divisibility
    height, width = step * Dim("rows", min=1), step * Dim("columns", min=1)
    return {0: batch, 2: height, 3: width}, {0: batch}


def _strip(model: onnx.ModelProto) -> None:
    """Remove source paths and stack traces, and make the raw outputs inner values again."""
    graph = model.graph
    outputs = list(graph.output)
    del graph.output[:]
    graph.output.extend(o for o in outputs if not o.name.startswith(RAW))
    known = {value.name for value in graph.value_info}
    graph.value_info.extend(o for o in outputs if o.name.startswith(RAW) and o.name not in known)
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.doc_string = ""
        del part.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    model.producer_name, model.producer_version = "fgd", ""


def expose_raw(model: onnx.ModelProto, features: bool = True) -> onnx.ModelProto:
    """A copy of the same graph whose raw predictions are outputs too, after its own, and what they
    are predicted from, unless `features` is False."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    raw = [v for v in model.graph.value_info if v.name.startswith(RAW)]
    copy.graph.output.extend(v for v in raw if features or not v.name.startswith(RAW + FEATURES))
    return copy
