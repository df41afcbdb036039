"""OrtDetector: image files in, detections out. numpy, Pillow and onnxruntime; no torch needed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnxruntime as ort

from deploy.errors import UserError
from deploy.preprocess import ImageSource, load_image, make_batch, prepare, resized_shape
from deploy.spec import INPUT_NAMES, OUTPUT_NAMES, ModelSpec

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_FATAL = 4  # ONNX Runtime's log level: what goes wrong reaches the user once, as our error
_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}


@dataclass
class Detections:
    """What was found in one image; R may be 0.

    boxes (R, 4) float32 xyxy in pixels of the original image, inside it, none of them empty;
    scores (R,) float32 in [0, 1], descending; labels (R,) int64 indexing the spec's `classes`;
    size (height, width) of the original image; input_size (height, width) the network saw;
    shrunk: a fixed canvas made that smaller than Detectron2 would have (expect lower accuracy).
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    size: Tuple[int, int]
    input_size: Tuple[int, int]
    shrunk: bool = False


class OrtDetector:
    """An exported detector in ONNX Runtime, with the resizing around it that training used.

    Safe to call from several threads at once.

    Args:
        path: .onnx file written by deploy/export.py; it alone suffices. A file of the same name
            ending in .json, if there, must be the one written with it.
        providers: execution providers, best first, as "cpu" / "cuda" / "tensorrt" or in ONNX
            Runtime's own names. Every one of them must really be in use afterwards.
        threads: intra-op threads; 0 lets ONNX Runtime decide.
        min_score: drop detections scored lower. None, or anything below the threshold that the
            graph was exported with, keeps all that the graph returns.
    Raises:
        UserError: no such file, not a graph of ours, damaged, or a provider is not available.
    """

    def __init__(
        self,
        path,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
        min_score: Optional[float] = None,
    ):
        self.path = Path(path)
        self.min_score = min_score
        content = _read(self.path)
        self.session = open_session(content, str(self.path), providers, threads)
        self.spec = _read_spec(self.session, self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        _check_sidecar(self.path, self.sha256)
        _check_contract(self.session, self.spec, self.path)

    def detect(self, images: Sequence[ImageSource], batch_size: int = 1) -> List[Detections]:
        """Detections of each image, in order; none for no images.

        Args:
            images: paths, PIL images or (H, W, 3) uint8 BGR arrays, of any sizes.
            batch_size: how many share one run; a graph exported with batch 1 ignores it. Images
                that share a run share a canvas, which can change scores slightly, as in training.
        Raises:
            UserError: an image cannot be read or is too thin, or the network gives NaN or
                infinity; nothing is returned for the others then.
        """
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}, expected 1 or more")
        size = 1 if self.spec.dynamic == "none" else batch_size
        detections = []
        for start in range(0, len(images), size):
            arrays = [load_image(source) for source in images[start : start + size]]
            prepared = [prepare(array, self.spec) for array in arrays]
            outputs = self.run(*make_batch(prepared, self.spec))
            for i, (array, image) in enumerate(zip(arrays, prepared, strict=True)):
                rows = {name: output[i] for name, output in outputs.items()}
                detections.append(self._detections(rows, array.shape[:2], image.shape[:2]))
        return detections

    def run(self, images: np.ndarray, image_sizes: np.ndarray) -> Dict[str, np.ndarray]:
        """The graph alone on what `make_batch` returns; its outputs by name, B rows each."""
        feed = dict(zip(INPUT_NAMES, (images, image_sizes), strict=True))
        outputs = self.session.run(list(OUTPUT_NAMES), feed)
        return dict(zip(OUTPUT_NAMES, outputs, strict=True))

    def _detections(self, rows, size, input_size) -> Detections:
        count = int(rows["num_dets"][0])
        boxes, scores, labels = (rows[name][:count] for name in ("boxes", "scores", "labels"))
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise UserError(
                f"{self.path} gives NaN or infinity for an image of {size}: its "
                "weights are damaged, or it overflows on this provider"
            )
        if count and not 0 <= labels.min() <= labels.max() < len(self.spec.classes):
            raise UserError(
                f"{self.path} gives class {labels.max()}, but names only "
                f"{len(self.spec.classes)} classes"
            )
        boxes = rescale(boxes, input_size, size)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        if self.min_score is not None:
            keep &= scores >= self.min_score
        shrunk = input_size != resized_shape(*size, self.spec.min_size, self.spec.max_size)
        labels = labels[keep].astype(np.int64)
        return Detections(boxes[keep], scores[keep], labels, size, input_size, shrunk)


def rescale(boxes: np.ndarray, input_size: Tuple[int, int], size: Tuple[int, int]) -> np.ndarray:
    """Boxes (R, 4) from the resized image to the original one, clipped to it (both as (h, w)).

    As Detectron2's `detector_postprocess`: rounding of the resized size makes the two scales
    differ slightly. Boxes may come out empty.
    """
    (input_h, input_w), (height, width) = input_size, size
    scale_x, scale_y = width / input_w, height / input_h
    boxes = boxes * np.array([scale_x, scale_y] * 2, np.float32)
    return boxes.clip(0, np.array([width, height] * 2, np.float32))


def open_session(
    model: bytes, name: str, providers: Sequence[str] = ("cpu",), threads: int = 0
) -> ort.InferenceSession:
    """A session that really runs on `providers`; ONNX Runtime alone would fall back silently.

    Args:
        model: serialised graph.  name: what to call it in messages.
        providers, threads: as in OrtDetector.
    Raises:
        UserError: a provider is unknown, not installed or does not start; the graph is damaged.
    """
    wanted = [_PROVIDERS.get(provider.lower(), provider) for provider in providers]
    missing = [provider for provider in wanted if provider not in ort.get_available_providers()]
    if missing or not wanted:
        raise UserError(
            f"this onnxruntime has no {', '.join(missing) or 'provider to use'}; it offers "
            f"{', '.join(ort.get_available_providers())}"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _FATAL
    # waiting threads would keep spinning and slow down whatever runs next in this process
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(model, options, providers=wanted, enable_fallback=0)
    except Exception as error:  # its exception classes share no base of their own
        raise UserError(f"ONNX Runtime cannot load {name}: {error}") from error
    used = session.get_providers()
    if used[: len(wanted)] != wanted:
        raise UserError(
            f"asked for {', '.join(wanted)} but ONNX Runtime started {', '.join(used)}: its "
            "libraries or the device are missing; see onnxruntime.ai for the versions it needs"
        )
    return session


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read model {path}: {error.strerror}") from error


def _read_spec(session: ort.InferenceSession, path: Path) -> ModelSpec:
    try:
        return ModelSpec.from_metadata(session.get_modelmeta().custom_metadata_map)
    except UserError as error:
        raise UserError(f"{path} was not written by deploy/export.py: {error}") from error


def _check_sidecar(path: Path, sha256: str) -> None:
    sidecar = path.with_suffix(".json")
    if not sidecar.exists():
        return
    expected = ModelSpec.from_json(sidecar).hashes.get("graph_sha256")
    if expected != sha256:
        raise UserError(
            f"{path} is not the graph that {sidecar} describes (SHA-256 {sha256[:12]}..., expected "
            f"{str(expected)[:12]}...): it was changed or damaged; export it again"
        )


def _check_contract(session: ort.InferenceSession, spec: ModelSpec, path: Path) -> None:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    if sorted(inputs) != sorted(INPUT_NAMES) or not set(OUTPUT_NAMES) <= set(outputs):
        raise UserError(
            f"{path} has inputs {sorted(inputs)} and outputs {outputs}; expected "
            f"{list(INPUT_NAMES)} and {list(OUTPUT_NAMES)}"
        )
    dtype = _DTYPES.get(inputs["images"].type)
    if dtype != spec.input_dtype:
        raise UserError(f"{path} takes {inputs['images'].type} but says {spec.input_dtype}")
