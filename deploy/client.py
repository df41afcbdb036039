"""TritonDetector: as OrtDetector, but the graph runs on a Triton server. numpy and Pillow only.

    detector = TritonDetector("http://localhost:8000/v2/models/shapes")
    (found,) = detector.detect(["photo.jpg"])

Reading, resizing and scaling back are the runtime's own. The request is the KServe protocol,
version 2, over HTTP, with Triton's binary tensors; what the model expects is read from the server,
where `deploy/triton.py` has put it.
"""

import hashlib
import http.client
import json
import re
import urllib.error
import urllib.request
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from deploy.errors import UserError
from deploy.serving.detector import Detector
from deploy.serving.preprocess import MAX_PIXELS
from deploy.spec import INPUT_NAMES, ModelSpec

_URL = re.compile(r"https?://[^/]+(/.*)?/v2/models/[^/]+(/versions/\d+)?")
_JSON_SIZE = "Inference-Header-Content-Length"  # header: how much of a body is JSON
_DATATYPES = {"FP32": "<f4", "UINT8": "|u1", "INT32": "<i4"}  # the protocol's -> numpy's
_NAMES = {"float32": "FP32", "uint8": "UINT8", "int32": "INT32"}

# url, body (None: GET) and headers -> the answer's body and headers. UserError if there is none.
Transport = Callable[[str, Optional[bytes], Mapping[str, str]], Tuple[bytes, Mapping[str, str]]]


def is_url(model) -> bool:
    """Whether a model is meant that a server runs, not a file."""
    return str(model).startswith(("http://", "https://"))


class TritonDetector(Detector):
    """A model that `deploy/triton.py` wrote, on a running server.

    Safe to call from several threads at once.

    Args:
        url: http://HOST:PORT/v2/models/NAME, or .../versions/N for one version.
        min_score, max_pixels: as in OrtDetector.
        transport: sends a request; for servers that need credentials, and for tests.
    Raises:
        UserError: no such server or model, or the model was not written by `deploy/triton.py`.
    """

    def __init__(
        self,
        url: str,
        min_score: Optional[float] = None,
        max_pixels: int = MAX_PIXELS,
        transport: Optional[Transport] = None,
    ):
        self.name = str(url).rstrip("/")
        if not _URL.fullmatch(self.name):
            raise UserError(f"{url} is not of the form http://HOST:PORT/v2/models/NAME")
        self.min_score, self.max_pixels = min_score, max_pixels
        self._send = transport or send
        config, metadata = self._get("/config"), self._get("")
        self.spec = _read_spec(config, self.name)
        self.max_batch = max(_integer(config.get("max_batch_size", 0), self.name), 1)
        described = json.dumps([config, metadata], sort_keys=True).encode()
        self.identity = f"{self.name} {hashlib.sha256(described).hexdigest()}"

    def run(self, images: np.ndarray, image_sizes: np.ndarray) -> Dict[str, np.ndarray]:
        inputs = dict(zip(INPUT_NAMES, (images, image_sizes), strict=True))
        body, headers = encode_request(inputs, self.spec.output_names)
        answer, headers = self._send(f"{self.name}/infer", body, headers)
        return decode_response(answer, headers, self.name)

    def _get(self, path: str) -> Dict[str, Any]:
        body, _ = self._send(self.name + path, None, {})
        return _parse(body, self.name)


def encode_request(inputs: Mapping[str, np.ndarray], outputs) -> Tuple[bytes, Dict[str, str]]:
    """Body and headers of an inference request: JSON, then the tensors one after the other.

    Args:
        inputs: arrays of float32, uint8 or int32 by name.  outputs: names of the wanted tensors.
    """
    tensors = {
        name: np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
        for name, value in inputs.items()
    }
    request = {
        "inputs": [
            {
                "name": name,
                "shape": list(value.shape),
                "datatype": _NAMES[value.dtype.name],
                "parameters": {"binary_data_size": len(tensors[name])},
            }
            for name, value in inputs.items()
        ],
        "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
    }
    header = json.dumps(request).encode()
    headers = {"Content-Type": "application/octet-stream", _JSON_SIZE: str(len(header))}
    return b"".join([header, *tensors.values()]), headers


def decode_response(body: bytes, headers: Mapping[str, str], url: str) -> Dict[str, np.ndarray]:
    """The tensors of an answer by name. UserError if it is damaged or not binary."""
    size = _integer(headers.get(_JSON_SIZE, len(body)), url)
    answer, start, outputs = _parse(body[:size], url), size, {}
    try:
        for output in answer["outputs"]:
            dtype = np.dtype(_DATATYPES[output["datatype"]])
            end = start + int(output["parameters"]["binary_data_size"])
            if end > len(body):
                raise ValueError(f"{len(body)} bytes, at least {end} were announced")
            values = np.frombuffer(body[start:end], dtype).reshape(output["shape"])
            outputs[output["name"]] = values.astype(dtype.newbyteorder("="))
            start = end
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{url} answers no binary tensors: {error!r}") from error
    return outputs


def send(
    url: str, body: Optional[bytes], headers: Mapping[str, str], timeout: float = 60
) -> Tuple[bytes, Mapping[str, str]]:
    """The default transport: GET without a body, else POST.

    Raises:
        UserError: no connection, no answer for `timeout` seconds, or an HTTP error, with the
            server's own explanation.
    """
    request = urllib.request.Request(url, body, dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {error.code} {_explanation(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"no answer from {url}: {reason or type(error).__name__}") from error


def _explanation(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return str(error.reason)


def _read_spec(config: Dict[str, Any], url: str) -> ModelSpec:
    try:
        metadata = json.loads(config["parameters"]["spec"]["string_value"])
        return ModelSpec.from_metadata(metadata)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        # UserError is a ValueError: a spec that is not ours
        raise UserError(
            f"{url} serves a model that was not written by deploy/triton.py: {error}"
        ) from error


def _parse(body: bytes, url: str) -> Dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise UserError(f"{url} does not answer in JSON: {error}") from error
    if not isinstance(answer, dict):
        raise UserError(f"{url} answers {type(answer).__name__}, expected a JSON object")
    return answer


def _integer(text, url: str) -> int:
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{url} answers {text!r} for a number") from error
