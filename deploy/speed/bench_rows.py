"""What a benchmark can time: exported graphs, and the same student run in other ways.

A `Contender` says what to load, and can be sent to another process; a `Runner` is it, loaded.
Needs numpy, onnx and the engines.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import onnx

from deploy.errors import UserError
from deploy.runtime import GraphDetector, open_session
from deploy.serving.engine import Session
from deploy.serving.preprocess import make_batch, prepare
from deploy.spec import INPUT_NAMES, ModelSpec
from deploy.speed.subgraph import network_only

GRAPH, NETWORK, CLIENT = "graph", "network", "client"
EAGER, COMPILE, SCRIPT, LEGACY = "eager", "compile", "torchscript", "legacy"
# kinds that need the checkpoint, and what their rows are called
BASELINES = {
    EAGER: "Detectron2 eager",
    COMPILE: "torch.compile",
    SCRIPT: "Detectron2 TorchScript",
    LEGACY: "legacy exporter, ONNX Runtime",
}
Images = Sequence[np.ndarray]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One way to run a detector.

    kind: `GRAPH`, or a key of `BASELINES`.  path: the .onnx file; of a baseline the checkpoint, or
    the file that Detectron2's tracing made of it.  spec: how images are prepared for it.
    engine: that runs a graph.
    """

    name: str
    kind: str
    path: Path
    spec: ModelSpec
    engine: str = "onnxruntime"


class Runner(ABC):
    """A loaded contender.

    max_batch: the most images per call, None for any number.
    """

    max_batch: Optional[int] = None

    @abstractmethod
    def call(self, images: Images) -> Call:
        """A function of nothing that runs on these (H, W, 3) uint8 BGR images as one batch. What
        does not belong into the clock is done before it is returned."""

    @abstractmethod
    def count(self, result: Any) -> Optional[int]:
        """Detections in what a call returned; None if it selects none."""


class GraphRunner(Runner):
    """Resized pixels to detections."""

    def __init__(self, detector: GraphDetector):
        self.detector, self.max_batch = detector, detector.max_batch

    def call(self, images):
        return bound_call(self.detector.session, _feed(images, self.detector.spec))

    def count(self, result):
        return int(result["num_dets"].sum())


class NetworkRunner(Runner):
    """The same graph without decoding and NMS behind the heads."""

    def __init__(self, detector: GraphDetector, threads: int):
        self.detector, self.max_batch = detector, detector.max_batch
        content = network_only(onnx.load(detector.path)).SerializeToString()
        name, whole = f"{detector.path}, cut", detector.session
        self.session = open_session(content, name, whole.providers, threads, whole.engine.name)

    def call(self, images):
        return bound_call(self.session, _feed(images, self.detector.spec))

    def count(self, result):
        return None


class ClientRunner(Runner):
    """Decoded image to detections: resizing and scaling back included."""

    def __init__(self, detector: GraphDetector):
        self.detector, self.max_batch = detector, detector.max_batch

    def call(self, images):
        return lambda: self.detector.detect(images, len(images))

    def count(self, result):
        return sum(len(detections.scores) for detections in result)


class LegacyRunner(Runner):
    """The graph that torch's older exporter makes of Detectron2's tracing adapter.

    Made for one image of one size, which it takes as (3, H, W) uint8.
    """

    max_batch = 1

    def __init__(self, path, spec: ModelSpec, provider: str, threads: int):
        content = Path(path).read_bytes()
        self.spec = spec
        self.session = open_session(content, BASELINES[LEGACY], [provider], threads)

    def call(self, images):
        pixels = prepare(images[0], self.spec).transpose(2, 0, 1)
        (name,) = (value.name for value in self.session.ort.get_inputs())
        return bound_call(self.session, {name: np.ascontiguousarray(pixels)})

    def count(self, result):
        return len(next(iter(result.values())))


def _feed(images: Images, spec: ModelSpec) -> Dict[str, np.ndarray]:
    batch = make_batch([prepare(image, spec) for image in images], spec)
    return dict(zip(INPUT_NAMES, batch, strict=True))


def bound_call(session: Session, feed: Dict[str, np.ndarray]) -> Call:
    """A function that runs the session on `feed` and returns its outputs by name, as arrays.

    On a GPU through ONNX Runtime's IO binding: inputs are copied into buffers that stay there
    between calls, and outputs come back once, at the end; both copies are inside the call.
    """
    if session.providers[0].startswith("CPU"):
        return lambda: session.run(feed)
    return binding_call(session, feed, "cuda")


def binding_call(session: Session, feed: Dict[str, np.ndarray], device: str) -> Call:
    """`bound_call` by IO binding, on "cuda" or "cpu"."""
    import onnxruntime as ort

    names, binding = session.output_names, session.ort.io_binding()
    buffers = {
        name: ort.OrtValue.ortvalue_from_numpy(value, device, 0) for name, value in feed.items()
    }
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(name, buffer)
    for name in names:
        binding.bind_output(name, device)  # by name only: some shapes depend on the content

    def run():
        for name, value in feed.items():
            buffers[name].update_inplace(value)
        session.ort.run_with_iobinding(binding)
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    return run


def short_names(paths: Sequence[Path]) -> List[str]:
    """What to call the files: their names, with as many folders as tell them apart.

    Raises:
        UserError: a file is given twice.
    """
    paths = [Path(path).resolve() for path in paths]
    twice = [str(path) for i, path in enumerate(paths) if path in paths[:i]]
    if twice:
        raise UserError(f"{twice[0]} is given twice")
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        depth += 1
