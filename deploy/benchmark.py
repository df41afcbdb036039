"""Command: how fast exported graphs are, beside each other and Detectron2 in the same run.

Needs numpy, Pillow, the engines, onnx and pycocotools; Detectron2 only where a checkpoint is
compared.
"""

import argparse
import hashlib
from pathlib import Path
from typing import List, Optional, Sequence

import numpy as np
from PIL import Image

from deploy.coco_data import load_dataset
from deploy.errors import UserError, run_main
from deploy.files import write_atomically, write_json
from deploy.runtime import load
from deploy.serving import engine, time_limit
from deploy.serving.preprocess import load_image
from deploy.spec import ModelSpec
from deploy.speed.bench_page import html_page, markdown
from deploy.speed.bench_rows import BASELINES
from deploy.speed.bench_run import Settings, benchmark
from deploy.speed.timing import available_cores
from fgd_inputs.file_names import find_images

_EXAMPLES = """examples:
  python deploy/benchmark.py model_final_onnx/model.onnx
  python deploy/benchmark.py a/model.onnx b/model.onnx --dataset test.json --threads 1
  python deploy/benchmark.py model.onnx --checkpoint model_final.pth --baselines eager legacy
  python deploy/benchmark.py model.onnx --engine onnxruntime --engine openvino --threads 2

Rows, alternated call by call:
  NAME.onnx, one or more         resized pixels to detections, in each --engine
  NAME.onnx, network only        without decoding and NMS behind the heads
  NAME.onnx, from image          decoded image to detections: resizing and scaling back included
and where the first graph's checkpoint is at hand, resized pixels to detections by
  Detectron2 eager (eager), torch.compile (compile; takes minutes and a C++ compiler),
  Detectron2 TorchScript (torchscript), legacy exporter, ONNX Runtime (legacy)

Writes benchmark.json, benchmark.md and benchmark.html.
"""


def synthetic_images(spec: ModelSpec, count: int) -> List[np.ndarray]:
    """Smooth random pictures (H, W, 3) uint8 BGR of the canvas' size, or 4:3 if it is dynamic."""
    height = spec.height or max(spec.min_size, 64)
    width = spec.width or height * 4 // 3
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 12, 16, 3), np.uint8)
    size, cubic = (width, height), Image.Resampling.BICUBIC
    return [np.asarray(Image.fromarray(pixels).resize(size, cubic)) for pixels in coarse]


def find_checkpoint(model, spec: ModelSpec) -> Optional[Path]:
    """The checkpoint that a graph was exported from, if it still lies where export.py found it.

    `X_onnx/model.onnx` comes from `X.pth` beside the folder; its SHA-256 must be the spec's.
    """
    folder = Path(model).resolve().parent
    path = folder.with_name(folder.name.removesuffix("_onnx") + ".pth")
    if folder.name.endswith("_onnx") and path.is_file():
        if hashlib.sha256(path.read_bytes()).hexdigest() == spec.hashes.get("checkpoint_sha256"):
            return path
    return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time exported models beside each other, and Detectron2 beside them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", help=".onnx files written by deploy/export.py")
    parser.add_argument("--checkpoint", help="default: the first graph's, if still in place")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=list(BASELINES),
        help="to run with the checkpoint; default: all that can run. One asked for must run",
    )
    parser.add_argument("--images", nargs="+", help="files or folders (default: smooth random)")
    parser.add_argument("--dataset", help="COCO-format JSON or registered name, to measure AP on")
    parser.add_argument("--images-root", metavar="DIR", help="of the JSON's images")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8], metavar="N")
    parser.add_argument("--threads", type=int, default=available_cores(), help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (%(default)s)")
    text = "what runs the graphs; again for more (onnxruntime)"
    engine.add_option(parser, text, action="append", default=[])
    parser.add_argument("--provider", default="cpu", help="cpu, cuda, tensorrt or ORT's own name")
    parser.add_argument("--output", metavar="DIR", help="default: the first model's folder")
    time_limit.add_option(parser)
    parser.add_argument("--debug", action="store_true", help="traceback on errors")
    return parser


def _check(args: argparse.Namespace) -> None:
    """UserError for a number that makes no sense, or a file that is not there."""
    smallest = {"--repeats": args.repeats, "--threads": args.threads, "--warmup": args.warmup + 1}
    smallest["--batch-sizes"] = min(args.batch_sizes)
    for option, value in smallest.items():
        if value < 1:
            raise UserError(f"{option} is too small")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise UserError(f"--checkpoint {args.checkpoint}: no such file")


def _main(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    time_limit.limit_time(args.time_limit)
    _check(args)
    engines = list(dict.fromkeys(args.engine)) or ["onnxruntime"]
    options = {"providers": [args.provider], "threads": args.threads}
    detectors = [load(path, name, **options) for path in args.models for name in engines]
    spec = detectors[0].spec
    if all(detector.max_batch for detector in detectors) and max(args.batch_sizes) > 1:
        print("exported with batch 1: other batch sizes are left out")
        args.batch_sizes = [1]
    checkpoint = args.checkpoint or find_checkpoint(args.models[0], spec)
    if not checkpoint:
        if args.baselines:
            raise UserError("--baselines: no checkpoint found, give one with --checkpoint")
        print("no checkpoint found: no Detectron2 rows (give one with --checkpoint)")
    images = synthetic_images(spec, max(args.batch_sizes))
    if args.images:
        images = [load_image(path) for path in find_images(args.images)]
    data = load_dataset(args.dataset, args.images_root) if args.dataset else None
    settings = Settings(
        batch_sizes=sorted(set(args.batch_sizes)),
        threads=args.threads,
        repeats=args.repeats,
        warmup=args.warmup,
        provider=args.provider,
        baselines=list(BASELINES) if args.baselines is None else args.baselines,
        required=args.baselines is not None,
    )
    report = benchmark(detectors, images, checkpoint, settings, data)
    _write(Path(args.output) if args.output else detectors[0].path.parent, report)
    return 0


def _write(folder: Path, report) -> None:
    text = markdown(report)
    print(text)
    write_json(folder / "benchmark.json", report)
    write_atomically(folder / "benchmark.md", text.encode("utf-8"))
    write_atomically(folder / "benchmark.html", html_page(report).encode("utf-8"))
    print(f"written: {folder / 'benchmark.html'}, .md, .json")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit code: 0 done, 2 bad usage, a missing provider or file."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
