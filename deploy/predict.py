"""Command: an exported detector on image files; writes detections.json and pictures.

numpy, Pillow and onnxruntime only.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np

from deploy.detector import Detections
from deploy.draw import draw_detections
from deploy.errors import UserError, run_main
from deploy.files import make_folder, write_atomically, write_json
from deploy.preprocess import SUFFIXES, load_image
from deploy.runtime import OrtDetector

_EXAMPLES = """examples:
  python deploy/predict.py model_final_onnx/model.onnx photos/ --output found
  python deploy/predict.py model.onnx a.jpg b.png --score 0.3 --batch-size 4 --no-images

Writes OUTPUT/detections.json (boxes as x1, y1, x2, y2 in pixels of the image) and
OUTPUT/pictures/. An image that cannot be read is named and left out; exit code 2 then.
"""
# after a number of images
SHRUNK = (
    "did not fit the graph's canvas and were shrunk further than in training, which costs accuracy;"
    " export with --dynamic image, or a --size that fits"
)


def find_images(paths: Sequence) -> List[Path]:
    """Files as given; of a folder, the images directly in it, by name.

    Raises:
        UserError: a folder holds no image.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"folder {path} holds no image ({', '.join(SUFFIXES)})")
        files += found
    return files


def predict(
    detector: OrtDetector,
    files: Sequence[Path],
    output,
    batch_size: int = 1,
    pictures: bool = True,
) -> Dict:
    """Detect objects in `files`, write `output`/detections.json and `output`/pictures/.

    Returns:
        What the JSON holds: "model", "graph_sha256", "classes", "min_score", "images" (a dict per
        file: file, height, width, boxes, scores, labels, class_names, shrunk, picture) and
        "failed" (file, error), all in the order of `files`.
    Raises:
        UserError: `output` cannot be written. A bad image does not raise.
    """
    output, images, failed = Path(output), [], []
    make_folder(output)  # fails now rather than after the work
    taken = {path.resolve() for path in files}  # a picture never replaces one of the inputs
    for start in range(0, len(files), batch_size):
        for file, array, result in _detect_each(detector, files[start : start + batch_size]):
            if isinstance(result, UserError):
                failed.append({"file": str(file), "error": str(result)})
                continue
            entry = _entry(file, result, detector.spec.classes)
            if pictures:
                target = _free_name(output / "pictures", file.stem, taken)
                _save_picture(target, array, result, detector.spec.classes)
                entry["picture"] = target.relative_to(output).as_posix()
            images.append(entry)
        show_progress(min(start + batch_size, len(files)), len(files))
    report = {
        "model": str(detector.path),
        "graph_sha256": detector.sha256,
        "classes": detector.spec.classes,
        "min_score": detector.min_score,
        "images": images,
        "failed": failed,
    }
    write_json(output / "detections.json", report)
    return report


def _detect_each(detector: OrtDetector, files: Sequence[Path]) -> Iterator[Tuple]:
    """(file, pixels, Detections or UserError) of each file; a bad one leaves the others alone."""
    arrays, results = {}, {}
    for i, file in enumerate(files):
        try:
            arrays[i] = load_image(file)
        except UserError as error:
            results[i] = error
    try:
        found = detector.detect(list(arrays.values()), batch_size=max(len(arrays), 1))
        results.update(zip(arrays, found, strict=True))
    except UserError:  # does not say which one: ask for each alone
        for i, array in arrays.items():
            try:
                (results[i],) = detector.detect([array])
            except UserError as error:
                results[i] = error
    for i, file in enumerate(files):
        yield file, arrays.get(i), results[i]


def _entry(file: Path, found: Detections, classes: Sequence[str]) -> Dict:
    return {
        "file": str(file),
        "height": found.size[0],
        "width": found.size[1],
        "boxes": [[round(float(x), 3) for x in box] for box in found.boxes],
        "scores": [round(float(score), 6) for score in found.scores],
        "labels": found.labels.tolist(),
        "class_names": [classes[label] for label in found.labels],
        "shrunk": found.shrunk,
    }


def _free_name(folder: Path, stem: str, taken: Set[Path]) -> Path:
    """folder/stem.jpg, or stem_2.jpg and so on if that is taken; takes it."""
    path, number = folder / f"{stem}.jpg", 1
    while path.resolve() in taken:
        number += 1
        path = folder / f"{stem}_{number}.jpg"
    taken.add(path.resolve())
    return path


def _save_picture(path: Path, image: np.ndarray, found: Detections, classes) -> None:
    picture = draw_detections(image, found.boxes, found.labels, classes, found.scores)
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
    parser.add_argument("model", help=".onnx file written by deploy/export.py")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", required=True, help="folder for detections.json and pictures/")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score kept (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="images per run (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: ONNX Runtime decides")
    parser.add_argument("--provider", default="cpu", help="cpu, cuda, tensorrt or ORT's own name")
    parser.add_argument("--no-images", action="store_true", help="write the JSON only")
    parser.add_argument("--debug", action="store_true", help="traceback on errors")
    return parser


def _main(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, expected 1 or more")
    files = find_images(args.images)
    detector = OrtDetector(args.model, [args.provider], args.threads, min_score=args.score)
    report = predict(detector, files, args.output, args.batch_size, not args.no_images)
    for failure in report["failed"]:
        print(f"failed: {failure['file']}: {failure['error']}", file=sys.stderr)
    count = sum(len(entry["boxes"]) for entry in report["images"])
    print(
        f"{len(report['images'])} images, {count} detections with score >= {args.score}, "
        f"{len(report['failed'])} failed: {Path(args.output) / 'detections.json'}"
    )
    shrunk = sum(entry["shrunk"] for entry in report["images"])
    if shrunk:
        print(f"{shrunk} {SHRUNK}")
    return 2 if report["failed"] else 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit code: 0 done, 2 bad usage or some images failed."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
