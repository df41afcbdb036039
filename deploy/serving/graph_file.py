"""Graph files are read whole, and refused if they take weights from elsewhere. Stdlib only.

An ONNX file may name other files that hold its tensors. ONNX Runtime, given the bytes alone, would
look for them in the folder that the command was started in, whatever lies there.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Tuple, Union

from deploy.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto

# Where tensors can be in onnx.proto: message -> field number -> message inside.
_INSIDE: Dict[str, Dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        **{5: "TensorProto", 10: "TensorProto", 6: "GraphProto", 11: "GraphProto"},
        **{22: "SparseTensorProto", 23: "SparseTensorProto"},
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of TensorProto
_VARINT, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types of protobuf


def read_graph_file(path) -> bytes:
    """The content of an .onnx file that holds all its weights.

    Raises:
        UserError: it cannot be read, is no ONNX model, or keeps weights in other files.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read model {path}: {error.strerror or error}") from error
    try:
        complete = _is_complete(content)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is no ONNX model, or damaged") from error
    if not complete:
        raise UserError(
            f"{path} keeps weights in other files, which deploy/export.py never does: export it "
            "again"
        )
    return content


def load_graph(path) -> Tuple[bytes, "ModelProto"]:
    """The content of such a file, and the same parsed by the onnx package; UserError as above."""
    from google.protobuf.message import DecodeError
    from onnx import load_from_string

    content = read_graph_file(path)
    try:
        return content, load_from_string(content)
    except DecodeError as error:
        raise UserError(f"{path} is no ONNX model, or damaged: {error}") from error


def _is_complete(content: bytes) -> bool:
    """Whether every tensor of a serialised ModelProto, also in subgraphs, has its data inside.

    Raises:
        ValueError, IndexError: it does not end where it says.
    """
    return not any(
        number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value)
        for kind, message in messages(content)
        if kind == "TensorProto"
        for number, value in fields(message)
    )


def messages(content: bytes) -> Iterator[Tuple[str, memoryview]]:
    """Every message of a serialised ModelProto where tensors can be, subgraphs' too, by its type.

    Raises:
        ValueError, IndexError: one does not end where it says.
    """
    waiting: List[Tuple[str, memoryview]] = [("ModelProto", memoryview(content))]
    while waiting:
        kind, message = waiting.pop()
        yield kind, message
        for number, value in fields(message):
            inside = _INSIDE[kind].get(number)
            if inside and isinstance(value, memoryview):
                waiting.append((inside, value))


def fields(message: memoryview) -> Iterator[Tuple[int, Union[int, memoryview]]]:
    """Number and value of each field; of those of fixed size the value is not read."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(message, position)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire}")
        if position + size > len(message):
            raise ValueError("cut off")
        yield number, message[position : position + size] if wire == _BYTES else 0
        position += size


def _varint(message: memoryview, position: int) -> Tuple[int, int]:
    """The number that begins at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than 10 bytes")
