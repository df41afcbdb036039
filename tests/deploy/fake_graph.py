"""A hand-made .onnx file that obeys the spec and whose every output is known in advance.

Three detections per image: boxes are FRACTIONS of the true image size, labels 0, 1, 2, and the
score of row c is the top left pixel of channel c over 255, which shows what came in, in what order.
"""

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.spec import ModelSpec

FRACTIONS = ((0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 1.0), (0.5, 0.1, 1.0, 0.9))
CLASSES = ("circle", "square", "triangle")


def fake_spec(**changes) -> ModelSpec:
    """The spec of a graph with dynamic batch and a canvas of 64 x 96."""
    spec = ModelSpec(
        architecture="RetinaNet",
        classes=list(CLASSES),
        input_format="BGR",
        input_dtype="float32",
        min_size=64,
        max_size=96,
        size_divisibility=32,
        height=64,
        width=96,
        dynamic="batch",
        max_detections=3,
        score_threshold=0.05,
        nms_threshold=0.5,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        opset=18,
    )
    return dataclasses.replace(spec, **changes)


def write_fake_graph(
    path, spec=None, fractions=FRACTIONS, labels=(0, 1, 2), count=3, divisor=255.0, metadata=True
) -> ModelSpec:
    """Save the graph at `path`. `divisor` 0 makes every score infinite or NaN."""
    spec = spec or fake_spec()
    constants = {
        "fractions": np.array([fractions], np.float32),  # (1, 3, 4)
        "labels_row": np.array([labels], np.int32),
        "count": np.array([[count]], np.int32),
        "divisor": np.array(divisor, np.float32),
        "xyxy": np.array([1, 0, 1, 0], np.int64),  # (h, w) -> (w, h, w, h)
        "identity": np.eye(3, dtype=np.float32)[:, :, None, None],  # the network
        "first": np.array(0, np.int64),
        "one": np.array([1], np.int64),
        "zero": np.array(0, np.int32),
        "starts": np.array([0], np.int64),
        "ends": np.array([1], np.int64),
    }
    nodes = [
        ("Gather", ["image_sizes", "xyxy"], "sizes_xyxy", {"axis": 1}),
        ("Unsqueeze", ["sizes_xyxy", "one"], "sizes_row", {}),
        ("Cast", ["sizes_row"], "sizes_float", {"to": TensorProto.FLOAT}),
        ("Mul", ["sizes_float", "fractions"], "boxes", {}),
        ("Cast", ["images"], "pixels", {"to": TensorProto.FLOAT}),
        ("Conv", ["pixels", "identity"], "features", {}),
        ("Gather", ["features", "first"], "left", {"axis": 3}),
        ("Gather", ["left", "first"], "corner", {"axis": 2}),
        ("Div", ["corner", "divisor"], "scores", {}),
        ("Slice", ["image_sizes", "starts", "ends", "one"], "heights", {}),
        ("Mul", ["heights", "zero"], "zeros", {}),
        ("Add", ["zeros", "count"], "num_dets", {}),
        ("Add", ["zeros", "labels_row"], "labels", {}),
    ]
    batch = 1 if spec.dynamic == "none" else "batch"
    dtype = TensorProto.FLOAT if spec.input_dtype == "float32" else TensorProto.UINT8
    height, width = spec.height or "height", spec.width or "width"
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [out], **attrs) for op, inputs, out, attrs in nodes],
        "fake",
        [
            helper.make_tensor_value_info("images", dtype, [batch, 3, height, width]),
            helper.make_tensor_value_info("image_sizes", TensorProto.INT32, [batch, 2]),
        ],
        [
            helper.make_tensor_value_info("num_dets", TensorProto.INT32, [batch, 1]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, 3, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 3]),
            helper.make_tensor_value_info("labels", TensorProto.INT32, [batch, 3]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if metadata:
        helper.set_model_props(model, spec.to_metadata())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return spec
