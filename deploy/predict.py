"""Command: an exported detector on image files; writes detections.json and pictures.

numpy, Pillow and onnxruntime or openvino only; for a model on a server, numpy and Pillow.
"""

import argparse
import warnings
from pathlib import Path
from typing import Optional, Sequence

from PIL import Image

from deploy.client import TritonDetector, is_url
from deploy.errors import UserError, run_main
from deploy.serving import engine, time_limit
from deploy.serving.coco_results import CocoIds
from deploy.serving.detector import Detector
from deploy.serving.many_images import predict, say
from deploy.serving.preprocess import MAX_PIXELS
from fgd_inputs.file_names import find_images
from fgd_inputs.names import one_line

_EXAMPLES = """examples:
  python deploy/predict.py model_final_onnx/model.onnx photos/ --output found
  python deploy/predict.py model.onnx a.jpg b.png --score 0.3 --batch-size 4 --no-images
  python deploy/predict.py model.onnx photos/ --output found --resume
  python deploy/predict.py http://localhost:8000/v2/models/NAME photos/ --output found
  python deploy/predict.py model.onnx val2017/ --output found --score 0 --no-images \
      --format coco --annotations instances_val2017.json

Writes OUTPUT/detections.json (boxes as x1, y1, x2, y2 in pixels of the image) and
OUTPUT/pictures/. With --format coco also OUTPUT/coco_results.json, and without --annotations
OUTPUT/coco_images.json, which says what the ids 1, 2, ... are.

OUTPUT/detections.jsonl is written as the run goes on. After an interruption the same command
with --resume keeps the finished images; those that failed or whose content has changed are tried
again. Two runs cannot share one OUTPUT.

Exit codes: 0 all images done; 2 bad usage, or some images failed: they are named with the
reason and left out, the others are done; 130 interrupted.
"""
# after a number of images
SHRUNK = (
    "did not fit the graph's canvas and were shrunk further than in training, which costs accuracy;"
    " export with --dynamic image, or a --size that fits"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Detect objects in image files with an exported model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help=".onnx file written by deploy/export.py, or the URL of a model on Triton"
    )
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", required=True, help="folder for detections.json and pictures/")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score kept (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="images per run (%(default)s)")
    engine.add_option(parser)
    parser.add_argument("--threads", type=int, default=0, help="0: the engine decides")
    parser.add_argument("--provider", default="cpu", help="cpu, cuda, tensorrt or ORT's own name")
    parser.add_argument("--no-images", action="store_true", help="write no pictures")
    parser.add_argument("--resume", action="store_true", help="keep what is finished in OUTPUT")
    parser.add_argument("--format", choices=("own", "coco"), default="own", help="coco: that too")
    parser.add_argument("--annotations", metavar="JSON", help="COCO file to take the ids from")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="larger images are refused before they are decoded (%(default)s)",
    )
    time_limit.add_option(parser)
    parser.add_argument("--debug", action="store_true", help="traceback on errors")
    return parser


def _check_usage(args) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, expected 1 or more")
    if args.max_pixels < 1:
        raise UserError(f"--max-pixels is {args.max_pixels}, expected 1 or more")
    if args.annotations and args.format != "coco":
        raise UserError("--annotations gives ids to --format coco, which is not asked for")


def _load(args) -> Detector:
    if is_url(args.model):
        return TritonDetector(args.model, args.score, args.max_pixels)
    from deploy.runtime import load

    return load(
        args.model,
        args.engine,
        providers=[args.provider],
        threads=args.threads,
        min_score=args.score,
        max_pixels=args.max_pixels,
    )


def _quiet_pillow(max_pixels: int) -> None:
    """Pillow's limit is one per process; its remarks on files that can be read help nobody here."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.filterwarnings("ignore", module="PIL")


def _main(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    time_limit.limit_time(args.time_limit)
    _check_usage(args)
    _quiet_pillow(args.max_pixels)
    files, output = find_images(args.images), Path(args.output)
    detector = _load(args)
    ids = None
    if args.format == "coco":
        ids = CocoIds(files, detector.spec.classes, args.annotations)
        for note in ids.notes:
            print(f"{one_line(args.annotations)}: {note}")
    report = predict(detector, files, output, args.batch_size, not args.no_images, args.resume, ids)
    for failure in report["failed"]:
        say(f"failed: {failure['file']}: {failure['error']}")
    count = sum(len(entry["boxes"]) for entry in report["images"])
    print(
        f"{len(report['images'])} images, {count} detections with score >= {args.score}, "
        f"{len(report['failed'])} failed: {one_line(str(output / 'detections.json'))}"
    )
    shrunk = sum(entry["shrunk"] for entry in report["images"])
    if shrunk:
        print(f"{shrunk} {SHRUNK}")
    return 2 if report["failed"] else 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit code: 0 done, 2 bad usage or some images failed, 130 interrupted."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
