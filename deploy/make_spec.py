"""The spec of a graph to be made, from the student's config and what the user asked for."""

from importlib.metadata import version
from operator import attrgetter
from typing import Optional, Tuple

from detectron2.config import CfgNode

from deploy.errors import UserError
from deploy.graphs.common import ExportableDetector
from deploy.graphs.convert import OPSET
from deploy.load import Student
from deploy.spec import ModelSpec

_PACKAGES = ("fgd", "detectron2", "torch", "onnx", "onnxscript")


def make_spec(
    student: Student,
    detector: ExportableDetector,
    size: Optional[Tuple[int, int]] = None,
    dynamic: str = "batch",
    input_dtype: str = "float32",
    target: str = "onnx",
    filled: bool = False,
) -> ModelSpec:
    """The spec of the file to be.

    Raises:
        UserError: the canvas is not a multiple of the backbone's divisibility, cannot be derived
            from the config, or was given although sizes are dynamic; or those are for TensorRT, or
            to be filled; or the backbone takes one canvas, and another is asked for.
    """
    inputs, step = student.cfg.INPUT, detector.size_divisibility
    if detector.square:
        size = _only_canvas(detector.square, inputs, size, dynamic, filled)
    if filled and dynamic == "image":
        raise UserError("--filled needs a fixed canvas: give --dynamic batch or none")
    if dynamic == "image" and target == "tensorrt":
        raise UserError(
            "--target tensorrt needs a fixed canvas, or the number of candidates would vary; give "
            "--dynamic batch or none, and --size H W"
        )
    if dynamic == "image":
        if size:
            raise UserError("--size fixes the canvas, --dynamic image leaves it open: choose one")
        size = (None, None)
    elif size is None:
        if inputs.MIN_SIZE_TEST <= 0:
            raise UserError(
                "INPUT.MIN_SIZE_TEST is 0 (no resizing): give the canvas with --size H W"
            )
        size = tuple(
            -(-side // step) * step for side in (inputs.MIN_SIZE_TEST, inputs.MAX_SIZE_TEST)
        )
    elif min(size) < step or size[0] % step or size[1] % step:
        raise UserError(f"--size {size[0]} {size[1]}: both must be multiples of {step}")
    return ModelSpec(
        architecture=type(student.model).__name__,
        classes=student.classes,
        input_format=inputs.FORMAT,
        input_dtype=input_dtype,
        min_size=inputs.MIN_SIZE_TEST,
        max_size=inputs.MAX_SIZE_TEST,
        size_divisibility=step,
        height=size[0],
        width=size[1],
        dynamic=dynamic,
        max_detections=detector.max_detections,
        score_threshold=attrgetter(detector.threshold_path)(student.model),
        nms_threshold=detector.nms_threshold,
        mean=list(student.cfg.MODEL.PIXEL_MEAN),
        std=list(student.cfg.MODEL.PIXEL_STD),
        opset=OPSET,
        target=target,
        filled=filled,
        task="instance_segmentation" if detector.mask_size else "detection",
        mask_size=detector.mask_size,
        proposals=detector.proposals,
        hashes={"checkpoint_sha256": student.checkpoint_sha256},
        versions={package: version(package) for package in _PACKAGES},
    )


def _only_canvas(
    square: int, inputs: CfgNode, size: Optional[Tuple[int, int]], dynamic: str, filled: bool
) -> Tuple[int, int]:
    """That of a vision transformer; UserError for whatever asks for another."""
    only = f"this student takes one canvas, {square}x{square} pixels (MODEL.VIT.SQUARE)"
    if dynamic == "image":
        raise UserError(f"--dynamic image: {only}; give --dynamic batch or none")
    if filled:
        raise UserError(f"--filled: {only}, and nothing is masked in it anyway; leave it out")
    if size and tuple(size) != (square, square):
        raise UserError(f"--size {size[0]} {size[1]}: {only}; leave --size out")
    if inputs.MIN_SIZE_TEST > 0 and inputs.MAX_SIZE_TEST > square:
        raise UserError(
            f"INPUT.MAX_SIZE_TEST {inputs.MAX_SIZE_TEST}: {only}; give a config of {square} or "
            "less with --config-file"
        )
    return square, square
