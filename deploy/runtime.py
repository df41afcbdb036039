"""GraphDetector: image files in, detections out. numpy, Pillow and the engine; no torch needed."""

import hashlib
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Type

import numpy as np

from deploy.errors import UserError
from deploy.serving.detector import Detector
from deploy.serving.engine import ENGINES, EXTRAS, Session, installed
from deploy.serving.graph_file import read_graph_file
from deploy.serving.graph_interface import GraphInterface, read_interface
from deploy.serving.preprocess import MAX_PIXELS
from deploy.spec import INPUT_NAMES, ModelSpec


class GraphDetector(Detector):
    """An exported detector in an engine, with the resizing around it that training used.

    Safe to call from several threads at once.

    Args:
        path: .onnx file written by deploy/export.py; it alone suffices. A file of the same name
            ending in .json, if there, must be the one written with it.
        providers: what ONNX Runtime runs on, best first, as "cpu" / "cuda" / "tensorrt" or in its
            own names. Every one of them must really be in use afterwards. OpenVINO takes "cpu".
        threads: within one run; 0 lets the engine decide.
        min_score: drop detections scored lower. None, or anything below the threshold that the
            graph was exported with, keeps all that the graph returns.
        max_pixels: larger images are refused before they are decoded.
        engine: "onnxruntime" or "openvino".
    Raises:
        UserError: no such file, not a graph of ours, damaged, or a provider or the engine is not
            available.
    """

    def __init__(
        self,
        path,
        providers: Sequence[str] = ("cpu",),
        threads: int = 0,
        min_score: Optional[float] = None,
        max_pixels: int = MAX_PIXELS,
        engine: str = "onnxruntime",
    ):
        self.path, self.name = Path(path), str(path)
        self.min_score, self.max_pixels = min_score, max_pixels
        content = read_graph_file(self.path)
        interface = read_interface(content, self.name)
        self.spec = _read_spec(interface, self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        # engines differ in the last digits, so a run that was begun in one goes on in that
        self.identity = self.sha256 if engine == "onnxruntime" else f"{self.sha256} in {engine}"
        self.max_batch = 1 if self.spec.dynamic == "none" else None
        _check_sidecar(self.path, self.sha256, self.spec)
        _check_interface(interface, self.spec, self.path)
        self.session = open_session(content, self.name, providers, threads, engine)

    def run(self, images: np.ndarray, image_sizes: np.ndarray) -> Dict[str, np.ndarray]:
        """The graph alone on what `make_batch` returns; its outputs by name, B rows each."""
        return self.session.run(dict(zip(INPUT_NAMES, (images, image_sizes), strict=True)))


OrtDetector = GraphDetector  # its name while there was one engine


def load(path, engine: str = "onnxruntime", **options) -> GraphDetector:
    """A `GraphDetector`, which says what the options are."""
    return GraphDetector(path, engine=engine, **options)


def open_session(
    model: bytes,
    name: str,
    providers: Sequence[str] = ("cpu",),
    threads: int = 0,
    engine: str = "onnxruntime",
) -> Session:
    """A graph opened in an engine.

    Args:
        model: serialised graph.  name: what to call it in messages.
        providers, threads, engine: as in `GraphDetector`.
    Raises:
        UserError: a provider is unknown, not installed or does not start; the engine is not
            installed; the graph is damaged.
    """
    return session_class(engine)(model, name, providers, threads)


def session_class(engine: str) -> Type[Session]:
    """Of an engine, imported now. UserError: there is no such engine, or it is not installed."""
    if engine not in ENGINES:
        raise UserError(f"engine {engine!r}: there is {', '.join(ENGINES)}")
    try:
        if engine == "openvino":
            from deploy.serving.openvino_session import OpenVinoSession

            return OpenVinoSession
        from deploy.serving.ort_session import OrtSession

        return OrtSession
    except ImportError as error:
        raise UserError(
            f"{ENGINES[engine]} cannot be used: {error}. It comes with the extra "
            f"{EXTRAS[engine]}: pip install -e '.[{EXTRAS[engine]}]'"
        ) from error


def engines_asked_for(engines: Sequence[str] = ()) -> List[str]:
    """These; without any, those that are installed. UserError: one of them is not installed."""
    for engine in engines:
        session_class(engine)
    return list(engines) or installed()


def _read_spec(interface: GraphInterface, path: Path) -> ModelSpec:
    try:
        return ModelSpec.from_metadata(interface.metadata)
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


def _check_interface(graph: GraphInterface, spec: ModelSpec, path: Path) -> None:
    """UserError unless the graph has the spec's tensors, and each has the spec's type and shape."""
    interface = spec.interface()
    for kind, found in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        expected = interface[kind]
        if sorted(found) != sorted(expected):
            raise UserError(f"{path} has {kind} {list(found)}; expected {list(expected)}")
        for name, tensor in expected.items():
            dtype, shape = found[name]
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
