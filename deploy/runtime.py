"""OrtDetector: image files in, detections out. numpy, Pillow and onnxruntime; no torch needed."""

import hashlib
from pathlib import Path
from typing import Dict, Optional, Sequence

import numpy as np
import onnxruntime as ort

from deploy.errors import UserError
from deploy.serving.bounded_run import run_session
from deploy.serving.detector import Detector
from deploy.serving.graph_file import read_graph_file
from deploy.serving.preprocess import MAX_PIXELS
from deploy.spec import INPUT_NAMES, ModelSpec

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_FATAL = 4  # ONNX Runtime's log level: what goes wrong reaches the user once, as our error
_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int32)": "int32"}


class OrtDetector(Detector):
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
        max_pixels: larger images are refused before they are decoded.
    Raises:
        UserError: no such file, not a graph of ours, damaged, or a provider is not available.
    """

    def __init__(
        self,
        path,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
        min_score: Optional[float] = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.path, self.name = Path(path), str(path)
        self.min_score, self.max_pixels = min_score, max_pixels
        content = read_graph_file(self.path)
        self.session = open_session(content, str(self.path), providers, threads)
        self.spec = _read_spec(self.session, self.path)
        self.sha256 = self.identity = hashlib.sha256(content).hexdigest()
        self.max_batch = 1 if self.spec.dynamic == "none" else None
        _check_sidecar(self.path, self.sha256, self.spec)
        _check_interface(self.session, self.spec, self.path)

    def run(self, images: np.ndarray, image_sizes: np.ndarray) -> Dict[str, np.ndarray]:
        """The graph alone on what `make_batch` returns; its outputs by name, B rows each."""
        feed = dict(zip(INPUT_NAMES, (images, image_sizes), strict=True))
        names = self.spec.output_names
        return dict(zip(names, run_session(self.session, names, feed, self.name), strict=True))


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


def _read_spec(session: ort.InferenceSession, path: Path) -> ModelSpec:
    try:
        return ModelSpec.from_metadata(session.get_modelmeta().custom_metadata_map)
    except UserError as error:
        raise UserError(f"{path} was not written by deploy/export.py: {error}") from error


def _check_sidecar(path: Path, sha256: str, spec: ModelSpec) -> None:
    sidecar = path.with_suffix(".json")
    if not sidecar.exists():
        return
    beside = ModelSpec.from_json(sidecar)
    expected = beside.hashes.pop("graph_sha256", None)
    if expected != sha256:
        raise UserError(
            f"{path} is not the graph that {sidecar} describes (SHA-256 {sha256[:12]}..., expected "
            f"{str(expected)[:12]}...): it was changed or damaged; export it again"
        )
    different = beside.differences(spec)
    if different:
        raise UserError(
            f"{sidecar} was edited: {'; '.join(different)}, as the graph says. Put back what was "
            "exported, or export again"
        )


def _check_interface(session: ort.InferenceSession, spec: ModelSpec, path: Path) -> None:
    """UserError unless the graph has the spec's tensors, and each has the spec's type and shape."""
    interface = spec.interface()
    for kind, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        found, expected = {value.name: value for value in values}, interface[kind]
        if sorted(found) != sorted(expected):
            raise UserError(f"{path} has {kind} {list(found)}; expected {list(expected)}")
        for name, tensor in expected.items():
            dtype, shape = _DTYPES.get(found[name].type, found[name].type), found[name].shape
            if dtype != tensor["dtype"] or not _same_shape(shape, tensor["shape"]):
                raise UserError(
                    f"{path}: {name} is {dtype} {shape}, but the file's own description says "
                    f"{tensor['dtype']} {tensor['shape']}; export it again"
                )


def _same_shape(found: Sequence, expected: Sequence) -> bool:
    """Whether a graph's shape is the spec's; what is a name there must be free in the graph."""
    return len(found) == len(expected) and all(
        actual == wanted or (isinstance(wanted, str) and not isinstance(actual, int))
        for actual, wanted in zip(found, expected)
    )
