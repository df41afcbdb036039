"""Command: COCO AP of an exported graph, boxes and masks, and of the PyTorch student beside it.

The graph side needs numpy, Pillow, an engine and pycocotools; Detectron2 is imported only for
--checkpoint and for registered dataset names.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

from deploy.coco_ap import METRICS, Result, coco_metrics
from deploy.coco_data import CocoData, load_dataset
from deploy.errors import ParityError, UserError, run_main
from deploy.files import write_json
from deploy.predict import SHRUNK
from deploy.runtime import GraphDetector, load
from deploy.serving import engine, time_limit
from deploy.serving.paste import encode_rle
from deploy.serving.progress import show_progress
from deploy.spec import ModelSpec
from fgd_inputs.names import one_line

MAX_AP_DIFFERENCE = 0.05  # points of AP, of 100
_EXAMPLES = """examples:
  python deploy/evaluate.py model_final_onnx/model.onnx --dataset coco_2017_val
  python deploy/evaluate.py model.onnx --dataset test.json --images photos/ --checkpoint model.pth

All detections over the graph's own score threshold count. With --checkpoint the PyTorch student is
evaluated too: exit code 4 if the APs differ by more than 0.05 points.
"""


def evaluate_graph(
    detector: GraphDetector, data: CocoData, batch_size: int = 1
) -> Tuple[Dict[str, Any], int]:
    """COCO metrics of a graph (see `coco_metrics`), and how many images its canvas shrank.

    Raises:
        UserError: class names differ; an image is missing, damaged or of another size than the
            dataset says (its boxes would not fit).
    """
    with_masks = has_mask_ap(detector.spec, data)
    missing = [record["file"] for record in data.images if not Path(record["file"]).is_file()]
    if missing:
        raise UserError(f"{data.name}: {len(missing)} images are missing, first {missing[0]}")
    shrunk = 0

    def results() -> Iterator[Result]:
        nonlocal shrunk
        for start in range(0, len(data.images), batch_size):
            records = data.images[start : start + batch_size]
            found = detector.detect([record["file"] for record in records], batch_size)
            for record, detections in zip(records, found, strict=True):
                check_size(record, detections.size)
                shrunk += detections.shrunk
                masks = list(map(encode_rle, detections.bitmaps())) if with_masks else None
                yield Result(detections.boxes, detections.scores, detections.labels, masks)
            show_progress(start + len(records), len(data.images))

    metrics = coco_metrics(data, detector.spec.classes, results())
    return metrics, shrunk


def has_mask_ap(spec: ModelSpec, data: CocoData) -> bool:
    """Whether mask AP can be measured: the graph and every true box have masks."""
    return bool(spec.mask_size) and data.with_masks


def load_eager(checkpoint, spec: ModelSpec):
    """The checkpoint's student as an `EagerDetector` with the graph's threshold
    and number of proposals.

    Raises:
        UserError: no checkpoint of ours, or its classes are not the spec's.
    """
    from deploy.eager import EagerDetector  # PyTorch and Detectron2, only where asked for

    eager = EagerDetector(checkpoint, spec.score_threshold, proposals=spec.proposals)
    if eager.classes != spec.classes:
        raise UserError(f"{checkpoint} has classes {eager.classes}, the graph has {spec.classes}")
    return eager


def evaluate_eager(eager, data: CocoData) -> Dict[str, Any]:
    """COCO metrics of a student in PyTorch, as Detectron2 reads, resizes and runs it."""

    def results() -> Iterator[Result]:
        for i, record in enumerate(data.images):
            result = Result(*eager.detect(record))
            yield result if data.with_masks else result._replace(masks=None)
            show_progress(i + 1, len(data.images))

    return coco_metrics(data, eager.classes, results())


def check_size(record: Dict[str, Any], size: Tuple[int, int]) -> None:
    """UserError unless an image of this (height, width) is what the dataset says it is."""
    if size != (record["height"], record["width"]):
        raise UserError(
            f"{record['file']} is {size[0]}x{size[1]} (height x width) but the dataset says "
            f"{record['height']}x{record['width']}: its boxes would not fit"
        )


def compare(graph: Dict[str, Any], pytorch: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """Metric to {"onnx"} or {"onnx", "pytorch", "difference"}; NaN as None.

    Classes are called "AP-name"; of masks all names begin with "mask ".
    """

    def flat(metrics):
        per_class = {f"AP-{name}": ap for name, ap in metrics["per_class"].items()}
        rows = {name: metrics[name] for name in METRICS} | per_class
        masks = flat(metrics["masks"]) if "masks" in metrics else {}
        return rows | {f"mask {name}": value for name, value in masks.items()}

    rows = {name: {"onnx": value} for name, value in flat(graph).items()}
    for name, value in flat(pytorch).items() if pytorch else ():
        rows[name] |= {"pytorch": value, "difference": rows[name]["onnx"] - value}
    return {
        name: {key: None if math.isnan(value) else value for key, value in row.items()}
        for name, row in rows.items()
    }


def format_table(rows: Dict[str, Dict[str, Optional[float]]]) -> str:
    """The result of `compare` as aligned text."""
    names = [one_line(name) for name in rows]
    width = max(map(len, names))
    columns = list(rows["AP"])
    lines = [" " * width + "".join(f"{column:>12}" for column in columns)]
    for name, row in zip(names, rows.values()):
        texts = ["-" if row[column] is None else f"{row[column]:.3f}" for column in columns]
        lines.append(f"{name:{width}}" + "".join(f"{text:>12}" for text in texts))
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="COCO AP of an exported model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=".onnx file written by deploy/export.py")
    parser.add_argument("--dataset", required=True, help="COCO-format JSON, or a registered name")
    parser.add_argument("--images", help='of a JSON (default: "images" beside it or above)')
    parser.add_argument("--checkpoint", help="evaluate this checkpoint in PyTorch too, and compare")
    parser.add_argument("--output", help="write the results to this JSON file")
    parser.add_argument("--batch-size", type=int, default=1, help="images per run (%(default)s)")
    engine.add_option(parser)
    parser.add_argument("--threads", type=int, default=0, help="0: the engine decides")
    parser.add_argument("--provider", default="cpu", help="cpu, cuda, tensorrt or ORT's own name")
    time_limit.add_option(parser)
    parser.add_argument("--debug", action="store_true", help="traceback on errors")
    return parser


def evaluate(detector: GraphDetector, data: CocoData, eager=None, batch_size=1) -> Dict[str, Any]:
    """Everything the command reports: "metrics" is what `compare` returns."""
    start = time.perf_counter()
    graph, shrunk = evaluate_graph(detector, data, batch_size)
    seconds = time.perf_counter() - start
    return {
        "model": str(detector.path),
        "graph_sha256": detector.sha256,
        "checkpoint_sha256": eager.student.checkpoint_sha256 if eager else None,
        "dataset": data.name,
        "images": len(data.images),
        "shrunk": shrunk,
        "batch_size": batch_size,
        "engine": str(detector.session.engine),
        "providers": detector.session.providers,
        "onnx_seconds": round(seconds, 3),
        "metrics": compare(graph, evaluate_eager(eager, data) if eager else None),
    }


def _main(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    time_limit.limit_time(args.time_limit)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, expected 1 or more")
    # all that can be refused is refused before the first image is run
    options = {"providers": [args.provider], "threads": args.threads}
    detector = load(args.model, args.engine, **options)
    data = load_dataset(args.dataset, args.images, bool(detector.spec.mask_size))
    data.category_ids(detector.spec.classes)
    eager = load_eager(args.checkpoint, detector.spec) if args.checkpoint else None
    report = evaluate(detector, data, eager, args.batch_size)
    images, seconds = report["images"], report["onnx_seconds"]
    print(f"{one_line(report['dataset'])}: {images} images, {seconds} s")
    for note in data.notes:
        print(one_line(f"{data.name}: {note}"))
    print(format_table(report["metrics"]))
    if report["shrunk"]:
        print(f"{report['shrunk']} {SHRUNK}")
    if args.output:
        write_json(args.output, report)
    for name in ("AP", "mask AP"):
        _check_difference(args, report, name)
    return 0


def _check_difference(args, report: Dict[str, Any], name: str) -> None:
    difference = report["metrics"].get(name, {}).get("difference", 0.0)
    if abs(difference) > MAX_AP_DIFFERENCE:
        raise ParityError(
            f"{name} of {args.model} is {difference:+.3f} points from {args.checkpoint}, more than "
            f"{MAX_AP_DIFFERENCE}"
            + (f"; {report['shrunk']} images {SHRUNK}" if report["shrunk"] else "")
        )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit code: 0 done, 2 bad usage or data, 4 the graph and the checkpoint disagree."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
