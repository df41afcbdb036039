"""One HTTP request, which ends in time with an answer or one line. Standard library only."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from queue import Empty, Queue
from typing import Mapping, Optional, Tuple

from deploy.errors import UserError
from deploy.serving.time_limit import time_limit
from fgd_inputs.names import one_line

Answer = Tuple[bytes, Mapping[str, str]]  # body and headers

_LONGEST = 1 << 30  # bytes of a body
_PIECE = 1 << 20
_EXPLANATION = 1 << 16  # bytes of an error's body that are read
_SHOWN = 300  # characters of a server's explanation


def send(
    url: str, body: Optional[bytes], headers: Mapping[str, str], timeout: float = 60
) -> Answer:
    """GET without a body, else POST.

    Args:
        timeout: seconds that may pass without a byte, and in which the answer to a GET must be
            whole. To a POST it must be within the `time_limit`.
    Raises:
        UserError: no connection, no answer in time, one over 1 GiB, or an HTTP error, with the
            server's own explanation.
    """
    limit = time_limit() if body is not None else min(timeout, time_limit())
    found: Queue = Queue()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, body, dict(headers))
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                found.put((_read(answer, limit), answer.headers))
        except urllib.error.HTTPError as error:
            found.put(UserError(f"{url}: {error.code} {_explanation(error)}"))
        except (OSError, ValueError, MemoryError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            text = one_line(str(reason), _SHOWN) or type(error).__name__
            found.put(UserError(f"no answer from {url}: {text}"))

    # In a thread, because a server that sends a byte now and then keeps every single read alive. A
    # thread that is given up does not keep the process alive.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=limit)
    except Empty:
        answer = UserError(f"no answer from {url}: {_late(limit)}")
    if isinstance(answer, UserError):
        raise answer
    return answer


def _read(answer, limit: float) -> bytes:
    pieces, size, end = [], 0, time.monotonic() + limit
    while piece := answer.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST} bytes")
        if time.monotonic() > end:  # what there is must not pass for the whole
            raise TimeoutError(_late(limit))
    if getattr(answer, "length", None):
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(pieces)


def _late(limit: float) -> str:
    return f"not whole after {limit:g} s (--time-limit)"


def _explanation(error: urllib.error.HTTPError) -> str:
    try:
        text = str(json.loads(error.read(_EXPLANATION))["error"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError, http.client.HTTPException):
        text = str(error.reason)
    return one_line(text, _SHOWN)
