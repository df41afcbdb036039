"""A graph in OpenVINO, on the CPU. It writes no cache and sends nothing."""

import sys
from collections import deque
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Deque, Dict, Iterator, Sequence

import numpy as np

from deploy.errors import UserError
from deploy.serving.engine import Engine, Session
from deploy.serving.graph_interface import read_interface
from deploy.serving.time_limit import time_limit

_SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",  # a CPU that has bfloat16 would compute in it, unasked
    "EXECUTION_MODE_HINT": "ACCURACY",
    "NUM_STREAMS": 1,
    "ENABLE_CPU_PINNING": False,  # threads tied to cores would get into each other's way
    "CACHE_DIR": "",
}
_ENDLESS = {"Loop", "Scan", "SequenceMap"}  # inside of which no run can be ended
# The inputs that each operator of our graphs has at least, if more than one. On a node with fewer,
# in a damaged file, OpenVINO 2026.4 crashes.
INPUTS = dict.fromkeys(
    "Add And Conv ConvTranspose DequantizeLinear Div Equal Expand Gather GatherElements GatherND "
    "Gemm Greater GreaterOrEqual GridSample Less MatMul Mod Mul NonMaxSuppression Pad "
    "QuantizeLinear Reshape Sub Tile TopK Unsqueeze".split(),
    2,
)
INPUTS |= dict.fromkeys("Range RoiAlign ScatterElements ScatterND Slice Where".split(), 3)
_TELEMETRY = "openvino_telemetry"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """A package beside OpenVINO, which that can do without, tells its makers of every import."""
    hidden = _TELEMETRY not in sys.modules
    if hidden:
        sys.modules[_TELEMETRY] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[_TELEMETRY]


with _without_telemetry():
    import openvino


class OpenVinoSession(Session):
    """See `deploy.runtime.open_session`. Runs of several threads wait for each other."""

    engine = Engine("openvino", openvino.__version__.split("-")[0])
    carries_nan = False  # ReLU makes 0 of it

    def __init__(self, model: bytes, name: str, providers: Sequence[str], threads: int):
        other = [provider for provider in providers if not provider.lower().startswith("cpu")]
        if other or not providers:
            raise UserError(
                f"OpenVINO runs on the CPU here, not on {', '.join(other) or 'nothing'}; providers "
                "are ONNX Runtime's"
            )
        interface = read_interface(model, name)
        _check_operators(interface.operators, name)
        self.name, self.providers, self.output_names = name, ["CPU"], list(interface.outputs)
        self._idle: Deque = deque()  # requests that no thread is using
        try:
            self.compiled = self._compile(model, threads)
        except Exception as error:  # its exception classes share no base of their own
            raise UserError(f"OpenVINO cannot load {name}: {_plain(error)}") from error
        # what nothing in the graph reads is no longer among them
        self._inputs = {name for port in self.compiled.inputs for name in port.names}

    def _compile(self, model: bytes, threads: int):
        # by name: of bytes alone OpenVINO would guess in which of its formats they are
        frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        graph = frontend.convert(frontend.load(BytesIO(model)))
        settings = {**_SETTINGS, "INFERENCE_NUM_THREADS": threads}
        return openvino.Core().compile_model(graph, "CPU", settings)

    def run(self, feed: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        seconds = time_limit()
        try:
            request = self._idle.pop()
        except IndexError:  # none is
            request = self.compiled.create_infer_request()
        # held here: the request reads the arrays themselves
        tensors = {x: np.ascontiguousarray(feed[x]) for x in feed if x in self._inputs}
        try:
            for name, value in tensors.items():
                request.set_tensor(name, openvino.Tensor(value, shared_memory=True))
            request.start_async()
            in_time = request.wait_for(max(1, int(1e3 * seconds)))
            if in_time:
                found = {name: request.get_tensor(name).data.copy() for name in self.output_names}
        except Exception as error:
            raise UserError(f"OpenVINO cannot run {self.name}: {_plain(error)}") from error
        if not in_time:
            _end(request)
            raise UserError(
                f"{self.name} ran for more than {seconds:g} s and was ended (--time-limit)"
            )
        self._idle.append(request)
        return found


def _check_operators(operators: Dict[str, int], name: str) -> None:
    """UserError for what OpenVINO could not be stopped in, or would crash on."""
    for operator, inputs in operators.items():
        if operator in _ENDLESS:
            raise UserError(
                f"{name} has a {operator}, inside of which OpenVINO cannot be ended when it takes "
                "too long; deploy/export.py writes none"
            )
        needed = INPUTS.get(operator, operator != "Constant")
        if inputs < needed:
            raise UserError(
                f"{name} is damaged: it has a {operator} with {inputs} of at least {needed} "
                "inputs; export it again"
            )


def _plain(error: Exception) -> str:
    """Its text without the lines that say where in OpenVINO's source it arose."""
    lines = str(error).splitlines()
    return " ".join(line for line in lines if not line.startswith("Exception from"))


def _end(request) -> None:
    """Between two nodes."""
    request.cancel()
    with suppress(Exception):  # which says that it was cancelled
        request.wait()
