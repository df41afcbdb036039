"""The exported file in an engine, its raw predictions readable, and what it promised checked."""

from typing import Dict, List, Tuple

import numpy as np
import onnx
from onnx import numpy_helper

from deploy.checks.matching import Found
from deploy.checks.verify_images import Batch
from deploy.graphs.convert import RAW, THRESHOLD, expose_raw
from deploy.runtime import open_session
from deploy.spec import INPUT_NAMES, MASKS, OUTPUT_NAMES, ModelSpec
from deploy.trt_lint import lint


class GraphUnderTest:
    """A session of the same graph whose raw predictions are outputs too, of float32 features as
    well: OpenVINO 2026.4 computes what follows wrongly where these are int8 and read from outside.

    Raises:
        UserError: the engine cannot load the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        name: str,
        engine: str = "onnxruntime",
        precision: str = "fp32",
    ):
        self.model, self.name, self.precision = model, name, precision
        self.output_names = [output.name for output in model.graph.output]
        exposed = expose_raw(model, features=precision == "fp32")
        self.session = open_session(exposed.SerializeToString(), name, engine=engine)

    @property
    def carries_nan(self) -> bool:
        """See `Session`."""
        return self.session.carries_nan

    @property
    def threshold(self) -> float:
        """The score threshold inside the graph, as float32."""
        return float(numpy_helper.to_array(self._threshold(self.model)))

    def with_threshold(self, value: float) -> "GraphUnderTest":
        """The same graph with another score threshold; the file stays as it is."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        changed = numpy_helper.from_array(np.array(value, np.float32), THRESHOLD)
        self._threshold(copy).CopyFrom(changed)
        return GraphUnderTest(copy, self.name, self.session.engine.name, self.precision)

    def run(self, batch: Batch) -> Tuple[Dict[str, np.ndarray], Dict[str, np.ndarray]]:
        """The outputs, and the raw predictions, by name."""
        results = self.session.run(dict(zip(INPUT_NAMES, batch)))
        raw = {name: value for name, value in results.items() if name.startswith(RAW)}
        return {name: results[name] for name in self.output_names}, raw

    @staticmethod
    def _threshold(model: onnx.ModelProto) -> onnx.TensorProto:
        return next(tensor for tensor in model.graph.initializer if tensor.name == THRESHOLD)


def detections(outputs: Dict[str, np.ndarray], image: int) -> Found:
    """The valid rows of one image."""
    count = int(outputs["num_dets"][image, 0])
    names = [name for name in (*OUTPUT_NAMES[1:], MASKS) if name in outputs]
    return Found(*(outputs[name][image, :count] for name in names))


def broken_promises(outputs: Dict[str, np.ndarray], batch: Batch, spec: ModelSpec) -> List[str]:
    """What these outputs break of the spec; [] when all is well."""
    return broken_shapes(outputs, batch, spec) or [
        f"image {i} of {batch.image_sizes[i]}: {text}"
        for i in range(len(batch.images))
        for text in _broken_rows(outputs, i, batch.image_sizes[i], spec)
    ]


def broken_shapes(outputs: Dict[str, np.ndarray], batch: Batch, spec: ModelSpec) -> List[str]:
    """The part of `broken_promises` without which the rows cannot be read."""
    size, k = len(batch.images), spec.max_detections
    promised = {
        "num_dets": (np.int32, (size, 1)),
        "boxes": (np.float32, (size, k, 4)),
        "scores": (np.float32, (size, k)),
        "labels": (np.int32, (size, k)),
    }
    if spec.mask_size:
        promised[MASKS] = (np.float32, (size, k, spec.mask_size, spec.mask_size))
    if list(outputs) != list(promised):
        return [f"the outputs are {', '.join(outputs)}, not {', '.join(promised)}"]
    broken = [
        f"{name} is {outputs[name].dtype} {outputs[name].shape}, not {np.dtype(dtype)} {shape}"
        for name, (dtype, shape) in promised.items()
        if outputs[name].dtype != dtype or outputs[name].shape != shape
    ]
    counts = [] if broken else outputs["num_dets"][:, 0].tolist()
    return broken + [f"{count} detections, not 0..{k}" for count in counts if not 0 <= count <= k]


def _broken_rows(outputs, image: int, size: np.ndarray, spec: ModelSpec) -> List[str]:
    count = int(outputs["num_dets"][image, 0])
    found = detections(outputs, image)
    boxes, scores, labels = (outputs[name][image, count:] for name in ("boxes", "scores", "labels"))
    corner = np.array([size[1], size[0]])
    masks = outputs.get(MASKS, np.zeros((image + 1, count, 0, 0)))[image]
    checks = {
        "rows past num_dets are not 0, 0, -1": not boxes.any()
        and not scores.any()
        and (labels == -1).all()
        and not masks[count:].any(),
        "NaN or infinity": np.isfinite(found.boxes).all() and np.isfinite(found.scores).all(),
        "scores not descending": (np.diff(found.scores) <= 0).all(),
        "a score outside 0..1": ((found.scores >= 0) & (found.scores <= 1)).all(),
        "a label without class": ((found.labels >= 0) & (found.labels < len(spec.classes))).all(),
        "a box outside the image": (found.boxes >= 0).all()
        and (found.boxes[:, 2:] <= corner).all(),
        "a mask outside 0..1": ((masks >= 0) & (masks <= 1)).all(),
        "an empty box": (found.boxes[:, :2] < found.boxes[:, 2:]).all(),
    }
    return [text for text, holds in checks.items() if not holds]


def broken_target(graph: GraphUnderTest, spec: ModelSpec) -> List[str]:
    """What TensorRT would refuse of a graph that is meant for it."""
    found = lint(graph.model) if spec.target == "tensorrt" else []
    return [f"for TensorRT, {finding}" for finding in found]


def broken_by_nan(graph: GraphUnderTest, batch: Batch) -> List[str]:
    """An image of NaN must give no detection and scores of NaN, and leave the others alone.

    An engine that does not carry NaN to the end of the network may give detections: the scores say
    what they are worth.

    Args:
        batch: float32 images; the first one is replaced.
    """
    images = batch.images.copy()
    images[0] = np.nan
    expected, _ = graph.run(batch)
    outputs, _ = graph.run(batch._replace(images=images))
    count, broken = int(outputs["num_dets"][0, 0]), []
    if count and graph.carries_nan:
        broken.append(f"an image of NaN gives {count} detections")
    if not np.isnan(outputs["scores"][0]).all():
        broken.append("an image of NaN is not marked by scores of NaN")
    if not all(np.allclose(outputs[name][1:], expected[name][1:], atol=1e-3) for name in outputs):
        broken.append("an image of NaN changes what is found in others")
    return broken
