"""What an .onnx file says of itself, read before any engine sees it. Standard library only."""

from dataclasses import dataclass
from typing import Dict, Iterator, List, NamedTuple, Optional, Union

from deploy.errors import UserError
from deploy.serving.graph_file import fields, messages

# numbers of TensorProto.DataType, as numpy calls them
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}
_DTYPES |= {11: "float64"}


class Tensor(NamedTuple):
    """An input or output. In a shape a name or None may vary."""

    dtype: str
    shape: List[Union[int, str, None]]


@dataclass
class GraphInterface:
    """metadata: its entries. inputs, outputs: by name, in order. operators: of the types of all
    nodes, those of subgraphs and functions too, the least number of inputs that one has."""

    metadata: Dict[str, str]
    inputs: Dict[str, Tensor]
    outputs: Dict[str, Tensor]
    operators: Dict[str, int]


def read_interface(content: bytes, name: str) -> GraphInterface:
    """Of a serialised ModelProto; its field numbers are those of onnx.proto.

    Raises:
        UserError: it is none, and `name` is what to call it.
    """
    try:
        model = memoryview(content)
        graphs = list(_messages(model, 7))
        weights = {_text(x, 8) for graph in graphs for x in _messages(graph, 5)}
        tensors = [
            {_text(x, 1): _tensor(x) for graph in graphs for x in _messages(graph, number)}
            for number in (11, 12)
        ]
        return GraphInterface(
            {_text(entry, 1): _text(entry, 2) for entry in _messages(model, 14)},
            {key: value for key, value in tensors[0].items() if key not in weights},
            tensors[1],
            _operators(content),
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"{name} is no ONNX model, or damaged") from error


def _operators(content: bytes) -> Dict[str, int]:
    least: Dict[str, int] = {}
    for kind, node in messages(content):
        if kind == "NodeProto":
            name, inputs = _text(node, 4), sum(1 for _ in _messages(node, 1))
            least[name] = min(inputs, least.get(name, inputs))
    return least


def _tensor(value_info: memoryview) -> Tensor:
    """Of a ValueInfoProto. What is no tensor has the type "unknown"."""
    kinds = [x for kind in _messages(value_info, 2) for x in _messages(kind, 1)]
    numbers = [value for kind in kinds for number, value in fields(kind) if number == 1]
    dtype = _DTYPES.get(numbers[-1], f"type {numbers[-1]}") if numbers else "unknown"
    shapes = [x for kind in kinds for x in _messages(kind, 2)]
    return Tensor(dtype, [_side(x) for shape in shapes for x in _messages(shape, 1)])


def _side(dimension: memoryview) -> Union[int, str, None]:
    side: Union[int, str, None] = None
    for number, value in fields(dimension):
        if number in (1, 2):
            side = value if isinstance(value, int) else str(value, "utf-8")
    return side


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, value in fields(message):
        if number == wanted and isinstance(value, memoryview):
            yield value


def _text(message: memoryview, wanted: int) -> str:
    """The last such field, as protobuf takes it; "" without one."""
    texts: List[Optional[memoryview]] = [None, *_messages(message, wanted)]
    return "" if texts[-1] is None else str(texts[-1], "utf-8")
