"""Command: distillation checkpoint -> verified ONNX file of the student alone, with a report."""

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
import onnx

from deploy.checks.inventory import Inventory, take_inventory
from deploy.checks.verification import verify
from deploy.checks.verify_images import read_images
from deploy.checks.verify_report import VerifyReport
from deploy.errors import ParityError, UserError, run_main
from deploy.export_options import build_parser
from deploy.files import make_folder, unnamed, write_json
from deploy.graphs import exportable
from deploy.graphs.common import ExportableDetector
from deploy.graphs.convert import to_onnx
from deploy.graphs.tensorrt.build import build_text, describe_build
from deploy.load import Student, load_student
from deploy.make_spec import make_spec
from deploy.receipt import chain, environment, which_checkpoint
from deploy.reduced.precision import FILES as REDUCED_FILES
from deploy.reduced.precision import Inputs, Reduction, add_precision, require_all_passed
from deploy.runtime import engines_asked_for
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
    engines: Sequence[str] = (),
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
        engines: to verify in; without any, those that are installed.
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
    inputs = (reduction or Reduction()).open(student.classes)
    engines = engines_asked_for(engines)
    loaded = Loaded(str(checkpoint), student, detector, spec, pixels, engines, inputs)
    make_folder(output)
    print(loaded.text())
    converted = _convert(loaded)
    with unnamed(output / "model.onnx", converted.content) as file:
        verified = _verify(loaded, converted, file)
        _publish(output, file, loaded, converted, verified)
    _add_precisions(output, loaded, converted, verified)
    return verified.report


@dataclass(frozen=True)
class Loaded:
    """All that can be refused before the export starts."""

    checkpoint: str
    student: Student
    detector: ExportableDetector
    spec: ModelSpec
    pixels: Optional[Sequence[np.ndarray]]  # to verify on, beside the built-in images
    engines: Sequence[str]  # to verify in
    inputs: Inputs  # of other precisions, and to measure AP

    def text(self) -> str:
        """Lines for a person."""
        lines = [f"config: {self.student.config_source}"]
        lines.append(f"checkpoint: {which_checkpoint(self.student.origin)}")
        for key, (count, size_bytes) in self.student.dropped.items():
            lines.append(f"left out: {key}, {count} tensors, {size_bytes / 1e6:.1f} MB")
        return "\n".join(lines)


@dataclass(frozen=True)
class Converted:
    """The graph as a file, its weights accounted for.  spec: with the file's hash."""

    model: onnx.ModelProto
    content: bytes
    spec: ModelSpec
    inventory: Inventory
    seconds: float


@dataclass(frozen=True)
class Verified:
    """What verification says of it, and how long it took."""

    report: VerifyReport
    seconds: float


def _refuse_existing(output: Path, force: bool) -> None:
    names = (*_GRAPH_FILES, "report.json")
    found = [name for name in names if (output / name).exists()]
    if found and not force:
        raise UserError(f"{output} already holds {', '.join(found)}; --force replaces them")


def _convert(loaded: Loaded) -> Converted:
    started = time.perf_counter()
    model = to_onnx(loaded.detector, loaded.spec)
    seconds = time.perf_counter() - started
    inventory = take_inventory(loaded.detector.student, model)
    if inventory.foreign_names:
        names = ", ".join(inventory.foreign_names[:3])
        raise ParityError(f"the graph holds weights that are not the student's: {names}")
    print(f"{inventory.text()}\nexported in {seconds:.0f} s, verifying")
    content = model.SerializeToString(deterministic=True)
    hashes = {**loaded.spec.hashes, "graph_sha256": hashlib.sha256(content).hexdigest()}
    return Converted(model, content, replace(loaded.spec, hashes=hashes), inventory, seconds)


def _verify(loaded: Loaded, converted: Converted, file: Path) -> Verified:
    started = time.perf_counter()
    report = verify(loaded.student.model, file, converted.spec, loaded.pixels, loaded.engines)
    return Verified(report, time.perf_counter() - started)


def _publish(output, file, loaded: Loaded, converted: Converted, verified: Verified) -> None:
    """Give the graph the name it deserves; what an earlier export left goes away.

    Raises:
        ParityError: it did not pass, and is kept as model.failed.onnx.
    """
    report = verified.report
    _write_report(output, loaded, converted, verified)
    for name in _GRAPH_FILES:
        (output / name).unlink(missing_ok=True)
    if report.passed:
        converted.spec.to_json(output / "model.json", report.engines)
    final = output / ("model.onnx" if report.passed else "model.failed.onnx")
    os.replace(file, final)
    print(report.table())
    if not report.passed:
        raise ParityError(f"{report.verdict}: {report.explanation}. Kept as {final}")
    print(f"written: {final} ({len(converted.content) / 1e6:.1f} MB)")


def _add_precisions(output, loaded: Loaded, converted: Converted, verified: Verified) -> None:
    """AP, the builds for TensorRT, and the other precisions; after each, report.json says more."""
    spec, inputs = converted.spec, loaded.inputs
    graph, made = output / "model.onnx", {}
    more = {"tensorrt": _describe_build(spec, graph)} if spec.target == "tensorrt" else {}
    more |= {"ap": inputs.single(graph), "precisions": made}
    _write_report(output, loaded, converted, verified, **more)
    for precision in dict.fromkeys(inputs.wanted.precisions):
        made[precision] = add_precision(
            precision,
            output,
            loaded.student,
            loaded.detector,
            spec,
            inputs,
            loaded.pixels,
            loaded.engines,
        )
        if made[precision]["verification"]["passed"] and spec.target == "tensorrt":
            more["tensorrt"] |= _describe_build(spec, output / f"model.{precision}.onnx")
        _write_report(output, loaded, converted, verified, **more)
    require_all_passed(made)


def _describe_build(spec: ModelSpec, path: Path) -> Dict[str, Any]:
    """How to build an engine of TensorRT from the file, also printed."""
    built = describe_build(spec, str(path), notes(onnx.load(path)))
    print(build_text(built))
    return {path.name: built}


def _write_report(output, loaded: Loaded, converted: Converted, verified: Verified, **more) -> None:
    """report.json, of what is known so far."""
    student, spec = loaded.student, converted.spec
    operators = Counter(node.op_type for node in converted.model.graph.node)
    details = {
        "checkpoint": loaded.checkpoint,
        "config": student.config_source,
        "values": converted.inventory.to_dict(),
        "graph": {
            "opset": converted.model.opset_import[0].version,
            "nodes": len(converted.model.graph.node),
            "operators": dict(operators.most_common()),
            "bytes": len(converted.content),
        },
        "seconds": {"export": round(converted.seconds, 1), "verify": round(verified.seconds, 1)},
        "versions": environment(spec.versions, verified.report.engines),
        "left_out": {
            key: {"tensors": count, "bytes": size_bytes}
            for key, (count, size_bytes) in student.dropped.items()
        },
        "verification": verified.report.to_dict(),
        "chain": chain(student.origin, spec.hashes),
    }
    write_json(output / "report.json", {**details, **more})


def run(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
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
        engines=args.engine,
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
