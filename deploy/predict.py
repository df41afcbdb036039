"""Command: an exported detector on image files; writes detections.json and pictures.

numpy, Pillow and onnxruntime only; for a model on a server, numpy and Pillow.
"""

import argparse
import io
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Set

import numpy as np
from PIL import Image

from deploy.client import TritonDetector, is_url
from deploy.errors import UserError, run_main
from deploy.files import make_folder, write_atomically, write_json
from deploy.serving import time_limit
from deploy.serving.coco_results import CocoIds
from deploy.serving.detector import Detections, Detector
from deploy.serving.draw import draw_detections
from deploy.serving.journal import Journal
from deploy.serving.paste import encode_rle
from deploy.serving.preprocess import MAX_PIXELS, find_images

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
with --resume keeps the finished images; those that failed or have changed are tried again.

Exit codes: 0 all images done; 2 bad usage, or some images failed: they are named with the
reason and left out, the others are done; 130 interrupted.
"""
# after a number of images
SHRUNK = (
    "did not fit the graph's canvas and were shrunk further than in training, which costs accuracy;"
    " export with --dynamic image, or a --size that fits"
)


def predict(
    detector: Detector,
    files: Sequence[Path],
    output,
    batch_size: int = 1,
    pictures: bool = True,
    resume: bool = False,
) -> Dict:
    """Detect objects in `files`, write `output`/detections.json and `output`/pictures/.

    Args:
        resume: keep what `output`/detections.jsonl says is finished.
    Returns:
        What the JSON holds: "model", "graph_sha256" (None on a server), "classes", "min_score",
        "images" (a dict per file: file, height, width, boxes, scores, labels, class_names, shrunk,
        picture; of a model with masks segmentations, COCO's RLE) and "failed" (file, error), all in
        the order of `files`.
    Raises:
        UserError: `output` cannot be written, or holds the journal of another model or other
            options. A bad image does not raise.
    """
    output, images, failed = Path(output), [], []
    make_folder(output)
    settings = {
        "model": detector.identity,
        "score": detector.min_score,
        "batch_size": batch_size,
        "pictures": pictures,
    }
    journal = Journal(output / "detections.jsonl", settings, resume)
    taken = {path.resolve() for path in files}  # a picture never replaces one of the inputs
    for start in range(0, len(files), batch_size):
        # whole batches: an image that ran in other company could score slightly differently
        batch = files[start : start + batch_size]
        entries = [_finished(journal, file, output) for file in batch]
        if None in entries:
            results = zip(batch, detector.detect_each(batch), strict=True)
            entries = [_result(detector, f, *r, output, taken, pictures) for f, r in results]
            journal.add([(f, entry) for f, entry in zip(batch, entries) if "error" not in entry])
        for entry in entries:
            (failed if "error" in entry else images).append(entry)
            if "picture" in entry:
                taken.add((output / entry["picture"]).resolve())
        show_progress(start + len(batch), len(files))
    report = {
        "model": detector.name,
        "graph_sha256": getattr(detector, "sha256", None),
        "classes": detector.spec.classes,
        "min_score": detector.min_score,
        "images": images,
        "failed": failed,
    }
    write_json(output / "detections.json", report)
    return report


def _finished(journal: Journal, file: Path, output: Path) -> Optional[Dict[str, Any]]:
    entry = journal.entry(file)
    lost = entry and "picture" in entry and not (output / entry["picture"]).exists()
    return None if lost else entry


def _result(detector, file, array, result, output, taken, pictures) -> Dict[str, Any]:
    """An entry of "images" or "failed"; writes the picture."""
    if isinstance(result, UserError):
        return {"file": str(file), "error": str(result)}
    entry = _entry(file, result, detector.spec.classes)
    if pictures:
        target = _free_name(output / "pictures", file.stem, taken)
        _save_picture(target, array, result, detector.spec.classes)
        entry["picture"] = target.relative_to(output).as_posix()
    return entry


def _entry(file: Path, found: Detections, classes: Sequence[str]) -> Dict:
    entry = {
        "file": str(file),
        "height": found.size[0],
        "width": found.size[1],
        "boxes": [[round(float(x), 3) for x in box] for box in found.boxes],
        "scores": [round(float(score), 6) for score in found.scores],
        "labels": found.labels.tolist(),
        "class_names": [classes[label] for label in found.labels],
        "shrunk": found.shrunk,
    }
    if found.masks is not None:
        entry["segmentations"] = [encode_rle(mask) for mask in found.bitmaps()]
    return entry


def _free_name(folder: Path, stem: str, taken: Set[Path]) -> Path:
    """folder/stem.jpg, or stem_2.jpg and so on if that is taken; takes it."""
    path, number = folder / f"{stem}.jpg", 1
    while path.resolve() in taken:
        number += 1
        path = folder / f"{stem}_{number}.jpg"
    taken.add(path.resolve())
    return path


def _save_picture(path: Path, image: np.ndarray, found: Detections, classes) -> None:
    picture = draw_detections(
        image, found.boxes, found.labels, classes, found.scores, found.bitmaps()
    )
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    write_atomically(path, buffer.getvalue())


def show_progress(done: int, total: int) -> None:
    """One line on stderr that counts up; nothing unless someone watches."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} images", end=end, file=sys.stderr, flush=True)


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
    parser.add_argument("--threads", type=int, default=0, help="0: ONNX Runtime decides")
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
    from deploy.runtime import OrtDetector  # ONNX Runtime, which a client of a server lacks

    return OrtDetector(args.model, [args.provider], args.threads, args.score, args.max_pixels)


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
    report = predict(detector, files, output, args.batch_size, not args.no_images, args.resume)
    if ids:
        write_json(output / "coco_results.json", ids.results(report["images"]))
        if not args.annotations:
            write_json(output / "coco_images.json", ids.dataset(report["images"]))
    for failure in report["failed"]:
        print(f"failed: {failure['file']}: {failure['error']}", file=sys.stderr)
    count = sum(len(entry["boxes"]) for entry in report["images"])
    print(
        f"{len(report['images'])} images, {count} detections with score >= {args.score}, "
        f"{len(report['failed'])} failed: {output / 'detections.json'}"
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
