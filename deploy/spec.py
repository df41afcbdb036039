"""ModelSpec: all that a client must know to use an exported graph. Standard library only."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from deploy.errors import UserError
from fgd_inputs.json_file import number, read_json, shown

FORMAT = "fgd-onnx-1"
INPUT_NAMES = ("images", "image_sizes")
OUTPUT_NAMES = ("num_dets", "boxes", "scores", "labels")
MASKS = "masks"  # the fifth output of instance segmentation
_CHOICES = {
    "task": ("detection", "instance_segmentation"),
    "input_format": ("BGR", "RGB"),
    "input_dtype": ("float32", "uint8"),
    "dynamic": ("none", "batch", "image"),
    "precision": ("fp32", "fp16", "int8"),
    "target": ("onnx", "tensorrt"),
}
_LARGEST = 65_535  # of any whole number: twice that in both directions would not fit into memory


def _text(value: Any) -> bool:
    return type(value) is str


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _finite(value: Any) -> bool:
    return math.isfinite(math.nan if number(value) is None else number(value))


def _list_of(holds):
    return lambda value: type(value) is list and all(map(holds, value))


# What a field of each type may hold, in words and as a test.
_TYPES = {
    str: ("text", _text),
    bool: ("true or false", lambda value: type(value) is bool),
    int: (f"a whole number in 0..{_LARGEST}", _count),
    Optional[int]: (
        f"a whole number in 1..{_LARGEST}, or null",
        lambda value: value is None or (_count(value) and value > 0),
    ),
    float: ("a finite number", _finite),
    List[str]: ("a list of texts", _list_of(_text)),
    List[float]: ("a list of finite numbers", _list_of(_finite)),
    Dict[str, str]: (
        "texts by name",
        lambda value: type(value) is dict and all(map(_text, [*value, *value.values()])),
    ),
}


def fills(size: Sequence[int], canvas: Sequence[int], step: int) -> bool:
    """Whether an image of this (height, width), rounded up to `step`, is as large as the canvas."""
    return all(0 <= whole - side < step for side, whole in zip(size, canvas))


@dataclass
class ModelSpec:
    """What one .onnx file promises; written as model.json and into the file's metadata.

    The client resizes (PIL bilinear, shortest edge to `min_size`, longest at most `max_size`;
    `min_size` 0 means no resizing), puts the pixels 0..255 at the top left of the canvas, and
    scales boxes back. Normalising, masking, decoding and NMS are inside the graph.

    Inputs:  images (B, 3, height, width) `input_dtype`, channels in `input_format` order;
             image_sizes (B, 2) int32, the true (height, width) inside the canvas.
    Outputs: num_dets (B, 1) int32; boxes (B, K, 4) float32 xyxy in canvas pixels, clipped to the
             true size; scores (B, K) float32 descending; labels (B, K) int32 indexing `classes`.
             K = `max_detections`. Rows past num_dets: boxes and scores 0, label -1.
             An image whose pixels or raw predictions are not all finite: every score NaN.
             Task "instance_segmentation" only: masks (B, K, M, M) float32, M = `mask_size`, the
             probability of the detection's class on a grid that spans its box; 0 past num_dets.

    Raises:
        UserError: a field has a value that no exporter of ours writes.
    """

    architecture: str  # meta-architecture, e.g. "RetinaNet"
    classes: List[str]
    input_format: str  # "BGR" | "RGB"
    input_dtype: str  # "float32" | "uint8"
    min_size: int  # pixels
    max_size: int  # pixels
    size_divisibility: int  # the canvas' sides are multiples of it
    height: Optional[int]  # of the canvas; None when dynamic == "image"
    width: Optional[int]
    dynamic: str  # "none": batch 1 and one canvas | "batch" | "image": batch, height and width
    max_detections: int
    score_threshold: float
    nms_threshold: float
    mean: List[float]  # per channel, in `input_format` order; for information
    std: List[float]
    opset: int
    task: str = "detection"
    mask_size: int = 0  # M of the masks; 0 without
    proposals: int = 0  # boxes per image, at most, that R-CNN's second stage sees; 0 without one
    precision: str = "fp32"  # "fp32" | "fp16" | "int8": what the network's weights are stored in
    target: str = "onnx"  # | "tensorrt": operators and sizes that TensorRT takes, see trt_lint.py
    # Every image, rounded up to size_divisibility, is as large as the canvas; of others all scores
    # are NaN.
    filled: bool = False
    hashes: Dict[str, str] = field(default_factory=dict)  # checkpoint_sha256, graph_sha256
    versions: Dict[str, str] = field(default_factory=dict)
    format: str = FORMAT

    def __post_init__(self):
        if self.format != FORMAT:
            raise UserError(f"model format {shown(self.format)} is not {FORMAT!r}; export it again")
        for f in fields(self):
            expected, holds = _TYPES[f.type]
            if not holds(getattr(self, f.name)):
                found = shown(getattr(self, f.name))
                raise UserError(f"model spec: {f.name} is {found}, expected {expected}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                found = shown(getattr(self, name))
                raise UserError(f"model spec: {name} is {found}, not in {allowed}")
        if not self.classes:
            raise UserError("model spec: no class names")
        if (self.mask_size > 0) != (self.task == "instance_segmentation"):
            raise UserError(f"model spec: mask_size {self.mask_size} contradicts task {self.task}")
        if (self.height is None) != (self.dynamic == "image") or (
            (self.width is None) != (self.height is None)
        ):
            raise UserError(
                f"model spec: canvas {self.height}x{self.width} contradicts dynamic={self.dynamic}"
            )
        if self.filled and self.height is None:
            raise UserError("model spec: filled is true, but there is no fixed canvas to be filled")

    def differences(self, other: "ModelSpec") -> List[str]:
        """ "classes is [...], not [...]" of each field in which another one differs."""
        a, b = asdict(self), asdict(other)
        return [
            f"{name} is {shown(a[name])}, not {shown(b[name])}" for name in a if a[name] != b[name]
        ]

    @property
    def output_names(self) -> Tuple[str, ...]:
        """Names of the graph's outputs, in order."""
        return (*OUTPUT_NAMES, MASKS) if self.mask_size else OUTPUT_NAMES

    def interface(self) -> Dict[str, Any]:
        """The class docstring as data: tensors by name with dtype, shape and meaning, and resizing.

        "batch", "height" and "width" in a shape may vary; numbers are fixed.
        """
        batch = 1 if self.dynamic == "none" else "batch"
        canvas = [self.height or "height", self.width or "width"]
        k = self.max_detections

        def tensor(dtype: str, shape: List, meaning: str) -> Dict[str, Any]:
            return {"dtype": dtype, "shape": [batch, *shape], "meaning": meaning}

        pixels = f"pixels 0..255, channels {self.input_format}, image at the top left of the canvas"
        outputs = {
            "num_dets": tensor("int32", [1], "valid rows; the others are 0, label -1"),
            "boxes": tensor("float32", [k, 4], "x1, y1, x2, y2 in pixels of the canvas"),
            "scores": tensor("float32", [k], "descending; all NaN if the network failed"),
            "labels": tensor("int32", [k], "index into classes"),
        }
        if self.mask_size:
            shape = [k, self.mask_size, self.mask_size]
            outputs[MASKS] = tensor("float32", shape, "probability of the class, over the box")
        size = "true height and width inside the canvas"
        if self.filled:
            size += f", each less than {self.size_divisibility} below it, or all scores are NaN"
        resize = f"PIL bilinear, shortest side {self.min_size}, longest at most {self.max_size}"
        return {
            "inputs": {
                "images": tensor(self.input_dtype, [3, *canvas], pixels),
                "image_sizes": tensor("int32", [2], size),
            },
            "outputs": outputs,
            "resize": resize if self.min_size else "none",
        }

    def to_json(self, path, engines: Sequence[Any] = ()) -> None:
        """Write the spec, and for readers its `interface` and the `Engine`s that proved the graph,
        as indented JSON with sorted keys."""
        values = {**asdict(self), "interface": self.interface()}
        if engines:
            values["verified_in"] = [str(engine) for engine in engines]
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path) -> "ModelSpec":
        """Read what `to_json` wrote. UserError for a missing, foreign or damaged file."""
        values = read_json(str(path), "model spec")
        if isinstance(values, dict):
            # follows from the rest; its name of before; differs with what was installed
            for name in ("interface", "contract", "verified_in"):
                values.pop(name, None)
        return cls._from_dict(values, where=str(path))

    def to_metadata(self) -> Dict[str, str]:
        """Strings for ONNX `metadata_props`. The hash of the graph is left out: it would be its own
        preimage."""
        values = asdict(self)
        values["hashes"] = {k: v for k, v in self.hashes.items() if k != "graph_sha256"}
        return {
            key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for key, value in sorted(values.items())
        }

    @classmethod
    def from_metadata(cls, metadata: Dict[str, str]) -> "ModelSpec":
        """Inverse of `to_metadata`; other keys are ignored. UserError as `from_json`."""
        texts = {f.name for f in fields(cls) if f.type is str}
        try:
            values = {
                f.name: metadata[f.name] if f.name in texts else json.loads(metadata[f.name])
                for f in fields(cls)
                if f.name in metadata
            }
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"the graph's metadata is damaged: {shown(error)}") from error
        return cls._from_dict(values, where="the graph's metadata")

    @classmethod
    def _from_dict(cls, values: Any, where: str) -> "ModelSpec":
        """Fields with a default may be missing: files from before there was such a field."""
        names = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
        required.add("format")
        found = set(values) if isinstance(values, dict) else set()
        if not required <= found <= names:
            raise UserError(
                f"{where} is no model spec of ours (missing {sorted(required - found)}, unknown "
                f"{shown(sorted(found - names))}); was the model written by deploy/export.py?"
            )
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
