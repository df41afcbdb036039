"""One run of a graph in ONNX Runtime, ended when it takes too long: a graph may loop for ever."""

import threading
import time
from typing import Dict, List, Mapping, Optional, Sequence

import numpy as np
import onnxruntime as ort

from deploy.errors import UserError
from deploy.serving.time_limit import time_limit

_LOOKS = 0.05  # seconds between two looks at the clock
_FATAL = 4  # ONNX Runtime's log level: what goes wrong reaches the user once, as our error

_lock = threading.Lock()
_ends: Dict[ort.RunOptions, float] = {}  # of the runs under way, when each must have ended
_watcher: Optional[threading.Thread] = None


def run_session(
    session: ort.InferenceSession,
    names: Sequence[str],
    feed: Mapping[str, np.ndarray],
    what: str,
) -> List[np.ndarray]:
    """The outputs called `names`.

    Args:
        what: runs, for messages.
    Raises:
        UserError: it did not end within the `time_limit`, after which it is ended between two
            nodes; or the graph cannot run on what it was fed.
    """
    options, seconds = ort.RunOptions(), time_limit()
    options.log_severity_level = _FATAL
    _watch(options, time.monotonic() + seconds)
    try:
        return session.run(names, feed, options)
    except Exception as error:  # ONNX Runtime's exception classes share no base of their own
        if options.terminate:
            raise UserError(
                f"{what} ran for more than {seconds:g} s and was ended (--time-limit)"
            ) from None
        raise UserError(f"ONNX Runtime cannot run {what}: {error}") from error
    finally:
        with _lock:
            del _ends[options]


def _watch(options: ort.RunOptions, end: float) -> None:
    """One thread for all runs: to start one for each would be seen in benchmarks."""
    global _watcher
    with _lock:
        _ends[options] = end
        if _watcher is None or not _watcher.is_alive():  # not alive: a fork has lost it
            _watcher = threading.Thread(target=_look, daemon=True)
            _watcher.start()


def _look() -> None:
    global _watcher
    while True:
        time.sleep(_LOOKS)
        with _lock:
            for options, end in _ends.items():
                if time.monotonic() > end:
                    options.terminate = True
            if not _ends:
                _watcher = None
                return
