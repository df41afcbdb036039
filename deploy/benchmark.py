"""Command: how fast an exported graph is, beside Detectron2 in the same run.

Needs numpy, Pillow, onnxruntime and onnx; Detectron2 only where a checkpoint is compared.
"""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnx
from PIL import Image

from deploy.errors import UserError, run_main
from deploy.files import write_json
from deploy.footprint import load_eager, measure_alone
from deploy.predict import find_images
from deploy.preprocess import load_image, make_batch, prepare
from deploy.runtime import OrtDetector, open_session
from deploy.spec import INPUT_NAMES, ModelSpec
from deploy.subgraph import network_only
from deploy.timing import (
    Timing,
    available_cores,
    describe_machine,
    interleave,
    noise,
)

EAGER = "Detectron2 eager"
GRAPH = "ONNX Runtime"
NETWORK = "ONNX Runtime, network only"
CLIENT = "ONNX Runtime, from image"
ROWS = (EAGER, GRAPH, NETWORK, CLIENT)
_EXAMPLES = """examples:
  python deploy/benchmark.py model_final_onnx/model.onnx
  python deploy/benchmark.py model.onnx --checkpoint model_final.pth --batch-sizes 1 --threads 1

Rows, alternated call by call:
  Detectron2 eager            resized pixels to detections, in PyTorch; needs the checkpoint
  ONNX Runtime                resized pixels to detections
  ONNX Runtime, network only  without decoding and NMS behind the heads
  ONNX Runtime, from image    decoded image to detections: resizing and scaling back included
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


@dataclass
class Settings:
    """How to measure: see the options of the command."""

    batch_sizes: Sequence[int] = (1, 4, 8)
    threads: int = 1
    repeats: int = 20
    warmup: int = 3
    provider: str = "cpu"


def benchmark(
    detector: OrtDetector, images: Sequence[np.ndarray], checkpoint=None, settings=None
) -> Dict[str, Any]:
    """Time all rows on the same images, and each detector's footprint alone.

    Args:
        detector: made with the provider and threads of the settings.
        images: (H, W, 3) uint8 BGR; used in turn to fill the batches.
        checkpoint: the same student's, for the Detectron2 row; None leaves that out.
        settings: default Settings().
    Returns:
        What benchmark.json holds. "rows": a dict per row and batch size (see Timing.summary, and
        "ratio": its p50 over that of Detectron2, or of ONNX Runtime where there is no checkpoint);
        "processes": see measure_alone; "noisy": reasons to distrust the figures.
    """
    settings, spec = settings or Settings(), detector.spec
    machine = describe_machine()  # before our own load
    threads, provider = settings.threads, settings.provider
    eager = load_eager(checkpoint, spec, provider, threads) if checkpoint else None
    most = _fill(images, max(settings.batch_sizes))
    paths = {EAGER: checkpoint, GRAPH: None} if checkpoint else {GRAPH: None}
    processes = {
        name: measure_alone(detector.path, path, spec, provider, threads, most)
        for name, path in paths.items()
    }
    rows, timings = _time_rows(detector, eager, images, settings)
    found, providers = detector.detect(images), detector.session.get_providers()
    return {
        "model": str(detector.path),
        "graph_sha256": detector.sha256,
        "file_mib": detector.path.stat().st_size / 2**20,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "machine": machine,
        "providers": providers,
        "threads": threads,
        "warmup": settings.warmup,
        "input_sizes": sorted({"{}x{}".format(*detections.input_size) for detections in found}),
        "detections_per_image": float(np.mean([len(detections.scores) for detections in found])),
        "rows": rows,
        "processes": processes,
        "noisy": noise(timings, machine["load_average"], threads, on_cpu=len(providers) == 1),
    }


def _fill(images: Sequence[np.ndarray], count: int) -> List[np.ndarray]:
    return [images[i % len(images)] for i in range(count)]


def _time_rows(
    detector: OrtDetector, eager, images: Sequence[np.ndarray], settings: Settings
) -> Tuple[List[Dict[str, Any]], Dict[str, Timing]]:
    """The report's rows, and all timings by a name to show."""
    content = network_only(onnx.load(detector.path)).SerializeToString()
    network = open_session(content, NETWORK, detector.session.get_providers(), settings.threads)
    rows, timings = [], {}
    for batch in settings.batch_sizes:
        calls = _calls(detector, network, eager, _fill(images, batch))
        measured = interleave(calls, settings.repeats, settings.warmup)
        reference = np.median(measured[EAGER if eager else GRAPH].wall)
        for name, timing in measured.items():
            row = {"row": name, "batch": batch, **timing.summary(batch)}
            rows.append({**row, "ratio": float(np.median(timing.wall) / reference)})
            timings[f"{name}, batch {batch}"] = timing
    return rows, timings


def _calls(
    detector: OrtDetector, network, eager, images: Sequence[np.ndarray]
) -> Dict[str, Callable[[], Any]]:
    """The rows as functions of nothing, all working on the same images."""
    prepared = [prepare(image, detector.spec) for image in images]
    batch = make_batch(prepared, detector.spec)
    feed = dict(zip(INPUT_NAMES, batch, strict=True))
    calls = {
        GRAPH: lambda: detector.run(*batch),
        NETWORK: lambda: network.run(None, feed),
        CLIENT: lambda: detector.detect(images, len(images)),
    }
    if eager:
        inputs = eager.as_inputs(prepared)
        calls = {EAGER: lambda: eager.run(inputs), **calls}
    return calls


def format_report(report: Dict[str, Any]) -> str:
    """The report as text: a table of rows, then one line per process, size and doubt."""
    lines = [
        f"{report['machine']['cpu']}, {report['threads']} threads, {report['providers'][0]}, "
        f"input {', '.join(report['input_sizes'])}, "
        f"{report['detections_per_image']:.1f} detections per image",
        f"{'row':27}{'batch':>6}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'images/s':>10}"
        f"{'CPU ms':>10}{'ratio':>8}",
    ]
    for row in report["rows"]:
        figures = (
            row[key] for key in ("p50_ms", "p90_ms", "p99_ms", "images_per_second", "cpu_ms")
        )
        lines.append(
            f"{row['row']:27}{row['batch']:>6}"
            + "".join(f"{figure:>10.2f}" for figure in figures)
            + f"{row['ratio']:>8.2f}"
        )
    for name, alone in report["processes"].items():
        peak = alone["peak_mib"] or float("nan")
        lines.append(f"{name}: loads in {alone['load_seconds']:.2f} s, peak memory {peak:.0f} MiB")
    lines.append(f"file: {report['file_mib']:.2f} MiB")
    lines += [f"NOISY, measure again: {reason}" for reason in report["noisy"]]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time an exported model, and Detectron2 beside it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=".onnx file written by deploy/export.py")
    parser.add_argument("--checkpoint", help="default: the one it was exported from, if in place")
    parser.add_argument("--images", nargs="+", help="files or folders (default: smooth random)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8], metavar="N")
    parser.add_argument("--threads", type=int, default=available_cores(), help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (%(default)s)")
    parser.add_argument("--provider", default="cpu", help="cpu, cuda, tensorrt or ORT's own name")
    parser.add_argument("--output", help="JSON file (default: benchmark.json beside the model)")
    parser.add_argument("--debug", action="store_true", help="traceback on errors")
    return parser


def _check(args: argparse.Namespace, spec: ModelSpec) -> None:
    smallest = {"--repeats": args.repeats, "--threads": args.threads, "--warmup": args.warmup + 1}
    smallest["--batch-sizes"] = min(args.batch_sizes)
    for option, value in smallest.items():
        if value < 1:
            raise UserError(f"{option} is too small")
    if spec.dynamic == "none" and max(args.batch_sizes) > 1:
        print("the graph was exported with batch 1: other batch sizes are left out")
        args.batch_sizes = [1]


def _main(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    detector = OrtDetector(args.model, [args.provider], args.threads)
    spec = detector.spec
    _check(args, spec)
    checkpoint = args.checkpoint or find_checkpoint(args.model, spec)
    images = synthetic_images(spec, max(args.batch_sizes))
    if args.images:
        images = [load_image(path) for path in find_images(args.images)]
    if not checkpoint:
        print("no checkpoint found: no Detectron2 row (give one with --checkpoint)")
    settings = Settings(args.batch_sizes, args.threads, args.repeats, args.warmup, args.provider)
    report = benchmark(detector, images, checkpoint, settings)
    print(format_report(report))
    write_json(args.output or detector.path.with_name("benchmark.json"), report)
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit code: 0 done, 2 bad usage, a missing provider or file."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
