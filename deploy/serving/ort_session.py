"""A graph in ONNX Runtime."""

from typing import Dict, Sequence

import numpy as np
import onnxruntime as ort

from deploy.errors import UserError
from deploy.serving.bounded_run import run_session
from deploy.serving.engine import Engine, Session

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_FATAL = 4  # ONNX Runtime's log level: what goes wrong reaches the user once, as our error


class OrtSession(Session):
    """See `deploy.runtime.open_session`. ort: ONNX Runtime's own object."""

    engine = Engine("onnxruntime", ort.__version__)

    def __init__(self, model: bytes, name: str, providers: Sequence[str], threads: int):
        self.name, self.ort = name, _open(model, name, providers, threads)
        self.providers = self.ort.get_providers()
        self.output_names = [output.name for output in self.ort.get_outputs()]

    def run(self, feed: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        values = run_session(self.ort, self.output_names, feed, self.name)
        return dict(zip(self.output_names, values, strict=True))


def _open(model: bytes, name: str, providers: Sequence[str], threads: int) -> ort.InferenceSession:
    """A session that really runs on `providers`; ONNX Runtime alone would fall back silently."""
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
