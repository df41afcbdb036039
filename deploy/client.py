"""TritonDetector: as GraphDetector, but the graph runs on a Triton server. numpy and Pillow only.

    detector = TritonDetector("http://localhost:8000/v2/models/shapes")
    (found,) = detector.detect(["photo.jpg"])

Reading, resizing and scaling back are the runtime's own. The request is the KServe protocol,
version 2, over HTTP, with Triton's binary tensors; what the model expects is read from the server,
where `deploy/triton_repository.py` has put it.
"""

import hashlib
import json
import re
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from deploy.errors import UserError
from deploy.serving.detector import Detector
from deploy.serving.http_request import Answer, send
from deploy.serving.preprocess import MAX_PIXELS
from deploy.spec import INPUT_NAMES, ModelSpec
from fgd_inputs.json_file import shown, whole
from fgd_inputs.names import one_line

_URL = re.compile(r"https?://[^/]+(/.*)?/v2/models/[^/]+(/versions/\d+)?")
_SIZE = re.compile("[0-9]{1,18}")
_JSON_SIZE = "Inference-Header-Content-Length"  # header: how much of a body is JSON
_DATATYPES = {"FP32": "<f4", "UINT8": "|u1", "INT32": "<i4"}  # the protocol's -> numpy's
_NAMES = {"float32": "FP32", "uint8": "UINT8", "int32": "INT32"}

_SHOWN = 300  # characters of a message about what the server sent
_LARGEST_BATCH = 65_535
# what reading an answer meets when it is not as it should be
_DAMAGED = (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)

# url, body (None: GET) and headers -> the answer's body and headers. UserError if there is none.
Transport = Callable[[str, Optional[bytes], Mapping[str, str]], Answer]


def is_url(model) -> bool:
    """Whether a model is meant that a server runs, not a file."""
    return str(model).startswith(("http://", "https://"))


class TritonDetector(Detector):
    """A model that `deploy/triton_repository.py` wrote, on a running server.

    Safe to call from several threads at once.

    Args:
        url: http://HOST:PORT/v2/models/NAME, or .../versions/N for one version.
        min_score, max_pixels: as in GraphDetector.
        transport: sends a request; for servers that need credentials, and for tests.
    Raises:
        UserError: no such server or model, or one that was not written by that command.
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
        batch = config.get("max_batch_size", 0)
        if whole(batch) is None or not 0 <= batch <= _LARGEST_BATCH:
            raise UserError(f"{self.name} answers {shown(batch)} for max_batch_size")
        self.max_batch = max(int(batch), 1)
        self.identity = f"{self.name} {_sha256([config, metadata], self.name)}"

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
    size = str(headers.get(_JSON_SIZE, len(body)))
    if not _SIZE.fullmatch(size) or int(size) > len(body):
        raise UserError(f"{url} answers {len(body)} bytes, {shown(size)} of them JSON")
    start, outputs = int(size), {}
    answer = _parse(body[:start], url)
    try:
        for output in answer["outputs"]:
            dtype = np.dtype(_DATATYPES[output["datatype"]])
            announced = whole(output["parameters"]["binary_data_size"])
            if announced is None or not 0 <= announced <= len(body) - start:
                found = shown(output["parameters"]["binary_data_size"])
                raise ValueError(f"{len(body) - start} bytes are left, {found} were announced")
            end = start + announced
            values = np.frombuffer(body[start:end], dtype).reshape(output["shape"])
            outputs[output["name"]] = values.astype(dtype.newbyteorder("="))
            start = end
    except _DAMAGED as error:
        message = one_line(repr(error), _SHOWN)
        raise UserError(f"{url} answers no binary tensors: {message}") from error
    return outputs


def _read_spec(config: Dict[str, Any], url: str) -> ModelSpec:
    try:
        metadata = json.loads(config["parameters"]["spec"]["string_value"])
        return ModelSpec.from_metadata(metadata)
    except _DAMAGED as error:  # UserError is a ValueError: a spec that is not ours
        raise UserError(
            f"{url} serves a model that was not written by deploy/triton_repository.py: "
            f"{_text(error)}"
        ) from error


def _parse(body: bytes, url: str) -> Dict[str, Any]:
    try:
        answer = json.loads(body)
    except _DAMAGED as error:
        raise UserError(f"{url} does not answer in JSON: {_text(error)}") from error
    if not isinstance(answer, dict):
        raise UserError(f"{url} answers {type(answer).__name__}, expected a JSON object")
    return answer


def _sha256(described: Any, url: str) -> str:
    try:
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    except RecursionError as error:
        raise UserError(f"{url} answers JSON that is nested too deeply") from error


def _text(error: Exception) -> str:
    return one_line(str(error), _SHOWN) or type(error).__name__
