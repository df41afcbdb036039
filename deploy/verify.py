"""Command: re-checks an exported graph against a checkpoint, and names what differs."""

import argparse
import tempfile
from pathlib import Path
from typing import Callable, Optional, Sequence, Tuple

import onnx

from deploy.checks.verification import verify
from deploy.checks.verify_images import read_images
from deploy.checks.verify_report import VerifyReport
from deploy.coco_data import CocoData, load_dataset
from deploy.errors import ParityError, UserError, run_main
from deploy.load import Student, load_student
from deploy.reduced.precision_gates import ApLoss, average_precision, verify_reduced
from deploy.reexport import (
    Differences,
    Graph,
    Reference,
    compare_graph,
    make_reference,
    read_graph,
)
from deploy.runtime import engines_asked_for
from deploy.serving import time_limit
from deploy.serving.engine import add_engines
from deploy.spec import ModelSpec

_EXAMPLES = """examples:
  python deploy/verify.py model_final_onnx/model.onnx model_final.pth
  python deploy/verify.py model.int8.onnx model_final.pth --dataset test.json

Exports the checkpoint again in memory and compares spec, nodes and weights; then runs the graph and
Detectron2 on the same images. The initializers that differ are named, with by how much.
Exit codes: 0 equal; 2 something about the command or a file; 4 not equal.
"""


def compare_with_checkpoint(
    onnx_path,
    checkpoint,
    config_file: Optional[str] = None,
    images=None,
    dataset: Optional[Tuple[str, Optional[str]]] = None,
    max_ap_drop: float = 1.0,
    engines: Sequence[str] = (),
) -> Tuple[Differences, Optional[VerifyReport]]:
    """Compare a file of ours with a checkpoint and print what is found.

    Args:
        onnx_path: in any precision; its .json beside it is checked as well.
        checkpoint, config_file: as `load_student` takes them.
        images: folder of images to compare detections on, beside the built-in ones.
        dataset: (COCO-format JSON or registered name, folder of its images or None), to measure
            the AP that a reduced precision costs.  max_ap_drop: points, for int8.
        engines: to run it in; without any, those that are installed.
    Returns:
        What differs, and the verification of the detections, None where the checkpoint's model
        predicts other tensors.
    Raises:
        UserError: bad input; int8 without a dataset, for nothing else can judge it; or an engine
            that is not installed.
    """
    graph = read_graph(onnx_path)
    spec = graph.spec
    if spec.precision == "int8" and not dataset:
        raise UserError(f"{onnx_path} is int8: what that costs is seen in AP; give --dataset")
    if spec.precision == "fp32" and dataset:
        raise UserError(f"{onnx_path} is float32: --dataset is for what a precision costs")
    engines = engines_asked_for(engines)
    student = _load_as(spec, checkpoint, config_file)
    pixels = read_images(images, spec) if images else None
    data = load_dataset(*dataset) if dataset else None
    print(_heading(graph, student, checkpoint))
    reference = make_reference(graph, student)
    differences, report = compare_graph(graph, reference), None
    if differences.comparable:
        measure = _ap_losses(graph, reference, data, engines[0]) if data else None
        report = _judge(graph, student, pixels, measure, max_ap_drop, engines)
        print(report.table())
    return differences, report


def _load_as(spec: ModelSpec, checkpoint, config_file: Optional[str]) -> Student:
    """The student with the options that the graph was exported with, where it has them."""
    student = load_student(checkpoint, config_file, spec.score_threshold)
    cfg = student.cfg.MODEL
    if cfg.META_ARCHITECTURE == spec.architecture and spec.proposals:
        if cfg.RPN.POST_NMS_TOPK_TEST != spec.proposals:
            return load_student(checkpoint, config_file, spec.score_threshold, spec.proposals)
    return student


def _heading(graph: Graph, student: Student, checkpoint) -> str:
    made_from = graph.spec.hashes.get("checkpoint_sha256", "unknown")
    same = made_from == student.checkpoint_sha256
    origin = "the one it was made from" if same else f"it was made from {made_from[:12]}..."
    return (
        f"graph       {graph.path}, {graph.spec.architecture} in {graph.spec.precision}, SHA-256 "
        f"{graph.sha256[:12]}...\n"
        f"checkpoint  {checkpoint}, SHA-256 {student.checkpoint_sha256[:12]}..., {origin}\n"
        f"config      {student.config_source}"
    )


def _judge(
    graph: Graph, student: Student, images, measure, max_ap_drop: float, engines: Sequence[str]
) -> VerifyReport:
    judged = student.model, graph.path, graph.spec, images
    if graph.spec.precision == "fp32":
        return verify(*judged, engines)
    return verify_reduced(*judged, measure, max_ap_drop, engines)


def _ap_losses(
    graph: Graph, reference: Reference, data: CocoData, first: str
) -> Callable[[str], ApLoss]:
    """AP of the file by engine, and of the checkpoint's float32 graph in the first."""
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(reference.single, Path(folder, "model.onnx"))
        before = average_precision(Path(folder, "model.onnx"), data, first)
    return lambda name: ApLoss(
        data.name, len(data.images), before, average_precision(graph.path, data, name)
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verify.py",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=".onnx file written by deploy/export.py")
    parser.add_argument("checkpoint", help="the checkpoint that it should be the student of")
    parser.add_argument("--config-file", metavar="FILE", help="as of deploy/export.py")
    parser.add_argument("--images", metavar="DIR", help="compare detections on these images too")
    parser.add_argument("--dataset", help="COCO-format JSON or registered name; int8 needs it")
    parser.add_argument("--images-root", metavar="DIR", help="of the JSON's images")
    parser.add_argument(
        "--max-ap-drop",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="AP that int8 may lose to float32, of 100 (%(default)s)",
    )
    add_engines(parser)
    time_limit.add_option(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    time_limit.limit_time(args.time_limit)
    dataset = (args.dataset, args.images_root) if args.dataset else None
    differences, report = compare_with_checkpoint(
        args.model,
        args.checkpoint,
        args.config_file,
        args.images,
        dataset,
        args.max_ap_drop,
        args.engine,
    )
    print(differences.text())
    reasons = [*differences.found]
    if report is None:
        reasons.append("its predictions are other tensors, nothing more can be compared")
    elif not report.passed:
        reasons.append(f"{report.verdict}: {report.explanation}")
    if reasons:
        raise ParityError(f"{args.model} is not the graph of {args.checkpoint}: {reasons[0]}")
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit code: 0 equal, 2 bad input, 4 not equal."""
    return run_main(run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
