"""Command: distillation checkpoint -> verified ONNX file of the student alone, with a report."""

import hashlib
import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

import onnx

from deploy.checks.inventory import take_inventory
from deploy.checks.verification import verify
from deploy.checks.verify_images import read_images
from deploy.checks.verify_report import VerifyReport
from deploy.errors import ParityError, UserError, run_main
from deploy.export_options import build_parser
from deploy.files import make_folder, write_atomically, write_json
from deploy.graphs import exportable
from deploy.graphs.common import ExportableDetector
from deploy.graphs.convert import to_onnx
from deploy.graphs.tensorrt.build import build_text, describe_build
from deploy.load import load_student
from deploy.make_spec import make_spec
from deploy.receipt import chain, environment, which_checkpoint
from deploy.reduced.precision import FILES as REDUCED_FILES
from deploy.reduced.precision import Reduction, add_precision, require_all_passed
from deploy.spec import ModelSpec
from deploy.trt_lint import notes

_GRAPH_FILES = ("model.onnx", "model.json", "model.failed.onnx", *REDUCED_FILES)


def export(
    checkpoint,
    output=None,
    *,
    config_file: Optional[str] = None,
    size: Optional[Tuple[int, int]] = None,
    dynamic: str = "batch",
    score_threshold: Optional[float] = None,
    proposals: Optional[int] = None,
    input_dtype: str = "float32",
    target: str = "onnx",
    filled: bool = False,
    images=None,
    force: bool = False,
    reduction: Optional[Reduction] = None,
) -> VerifyReport:
    """Export, verify, and only then give the file its name.

    Args:
        checkpoint: .pth file.  output: folder; default `<stem>_onnx` beside the checkpoint.
        config_file: used instead of the config found with the checkpoint.
        size: (height, width) of the canvas; default from the config's test size.
        dynamic: "none", "batch" or "image" (see `ModelSpec`).
        score_threshold, proposals: replace the config's.  input_dtype: "float32" or "uint8".
        target: "onnx", or "tensorrt": operators and sizes that TensorRT takes (see `trt_lint`).
        filled: all images will fill the canvas, so that nothing needs to be masked.
        images: folder of images to verify on, beside the built-in ones.
        force: replace an earlier export.
        reduction: what to make beside the float32 graph; default nothing.
    Returns:
        The passed report; `output` then holds model.onnx, model.json and report.json, and the same
        of each precision asked for: model.fp16.onnx, ...
    Raises:
        UserError: bad input, or an earlier export is there.
        ParityError: not shown to be equal; `output` then holds model.failed.onnx and report.json.
            Or a precision costs too much: model.onnx is there, and model.int8.failed.onnx, say.
    """
    checkpoint = Path(checkpoint)
    output = Path(output) if output else checkpoint.with_name(f"{checkpoint.stem}_onnx")
    _refuse_existing(output, force)
    student = load_student(checkpoint, config_file, score_threshold, proposals)
    detector = exportable(student.model)
    spec = make_spec(student, detector, size, dynamic, input_dtype, target, filled)
    pixels = read_images(images, spec) if images else None
    reduction = reduction or Reduction()
    inputs = reduction.open(student.classes)
    make_folder(output)
    print(f"config: {student.config_source}")
    print(f"checkpoint: {which_checkpoint(student.origin)}")
    for key, (count, size_bytes) in student.dropped.items():
        print(f"left out: {key}, {count} tensors, {size_bytes / 1e6:.1f} MB")
    model, details = _convert(detector, spec)
    details = {"checkpoint": str(checkpoint), "config": student.config_source, **details}
    details["versions"] = environment(spec.versions)
    details["left_out"] = {
        key: {"tensors": count, "bytes": size_bytes}
        for key, (count, size_bytes) in student.dropped.items()
    }
    report = _verify_and_publish(output, student, spec, model, pixels, details)
    print(report.table())
    if not report.passed:
        kept = output / "model.failed.onnx"
        raise ParityError(f"{report.verdict}: {report.explanation}. Kept as {kept}")
    print(f"written: {output / 'model.onnx'} ({details['graph']['bytes'] / 1e6:.1f} MB)")
    _add_build(details, spec, output / "model.onnx")
    details["ap"] = inputs.single(output / "model.onnx")
    write_json(output / "report.json", details)
    reduced = details["precisions"] = {}
    for precision in reduction.precisions:
        reduced[precision] = add_precision(precision, output, student, spec, inputs, pixels)
        if reduced[precision]["verification"]["passed"]:
            _add_build(details, spec, output / f"model.{precision}.onnx")
        write_json(output / "report.json", details)
    require_all_passed(reduced)
    return report


def _refuse_existing(output: Path, force: bool) -> None:
    names = (*_GRAPH_FILES, "report.json")
    found = [name for name in names if (output / name).exists()]
    if found and not force:
        raise UserError(f"{output} already holds {', '.join(found)}; --force replaces them")


def _convert(detector: ExportableDetector, spec: ModelSpec) -> Tuple[onnx.ModelProto, Dict]:
    """The ONNX model, its weights accounted for, and what report.json says about it."""
    started = time.perf_counter()
    model = to_onnx(detector, spec)
    seconds = time.perf_counter() - started
    inventory = take_inventory(detector.student, model)
    if inventory.foreign_names:
        names = ", ".join(inventory.foreign_names[:3])
        raise ParityError(f"the graph holds weights that are not the student's: {names}")
    print(f"{inventory.text()}\nexported in {seconds:.0f} s, verifying")
    operators = Counter(node.op_type for node in model.graph.node)
    graph = {
        "opset": model.opset_import[0].version,
        "nodes": len(model.graph.node),
        "operators": dict(operators.most_common()),
    }
    seconds = {"export": round(seconds, 1)}
    return model, {"values": inventory.to_dict(), "graph": graph, "seconds": seconds}


def _verify_and_publish(output: Path, student, spec, model, pixels, details) -> VerifyReport:
    """Write the graph under a temporary name, verify it, give it the name it deserves.

    What an earlier export left goes away. `details` is completed and becomes report.json.
    """
    content = model.SerializeToString(deterministic=True)
    spec.hashes["graph_sha256"] = hashlib.sha256(content).hexdigest()
    temporary = output / f".model.onnx.{os.getpid()}.tmp"
    try:
        write_atomically(temporary, content)
        started = time.perf_counter()
        report = verify(student.model, temporary, spec, pixels)
        details["seconds"]["verify"] = round(time.perf_counter() - started, 1)
        details["graph"]["bytes"] = len(content)
        details["verification"] = report.to_dict()
        details["chain"] = chain(student.origin, spec.hashes)
        write_json(output / "report.json", details)
        for name in _GRAPH_FILES:
            (output / name).unlink(missing_ok=True)
        if report.passed:
            spec.to_json(output / "model.json")
        os.replace(temporary, output / ("model.onnx" if report.passed else "model.failed.onnx"))
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _add_build(details: Dict, spec: ModelSpec, path: Path) -> None:
    """Where TensorRT is the target: how to build an engine from the file, to report.json too."""
    if spec.target == "tensorrt":
        built = describe_build(spec, str(path), notes(onnx.load(path)))
        details.setdefault("tensorrt", {})[path.name] = built
        write_json(path.with_name("report.json"), details)
        print(build_text(built))


def run(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore", "torch.meshgrid")  # from Detectron2's anchor generator
    if (args.recipe, args.target) == ("onnx", "tensorrt"):
        raise UserError("--recipe onnx makes uint8, which TensorRT refuses: leave it out")
    export(
        args.checkpoint,
        args.output,
        config_file=args.config_file,
        size=tuple(args.size) if args.size else None,
        dynamic=args.dynamic,
        score_threshold=args.score_threshold,
        proposals=args.proposals,
        input_dtype=args.input_dtype,
        target=args.target,
        filled=args.filled,
        images=args.images,
        force=args.force,
        reduction=Reduction(
            args.precision,
            args.recipe or args.target,
            args.calibration,
            args.dataset,
            args.images_root,
            args.max_ap_drop,
        ),
    )
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; returns its exit code."""
    return run_main(run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
