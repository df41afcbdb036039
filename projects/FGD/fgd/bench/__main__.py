"""``python -m fgd.bench loss``, ``step`` and ``gpu``; ``--help`` shows the options."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import torch

from ..config import check_device, load_config
from ..errors import UserError
from ..files import atomic_write, check_output_dir
from ..processes.alone import ALLOCATORS, run_alone
from ..timing import available_cores, describe_machine
from . import gpu, gpu_report, loss, loss_report, step, step_report
from .cases import PYRAMIDS

_LOSS = """The FGD loss alone, masks, forward and backward: the authors' arrangement with its loop
over boxes, and this project's, alternated round by round. Time, memory, and goals; writes
loss.json and loss.png. On glibc each pyramid is measured twice, with the allocator as it is and
with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised so that it keeps large buffers."""
_STEP = """A training step of a distillation config on synthetic images: student alone, teacher
forward, both with a method or with each of several, FGD beside them; and the teacher in half
precision and channels last, with the change of each of the method's terms. Writes step.json.
Weights that are no local file are RANDOM here: nothing is downloaded. Reading and augmenting images
is not part of the step."""
_GPU = """All that only a GPU can show, in under 6 minutes and without network: kernels and methods
against float64, time of the loss and of whole steps, waits of the host, a training in mixed
precision, a resume. Writes gpu.json and gpu.md, again after each part. Exit code 4 where a figure
is wrong, 1 where a part broke off; a missed goal and a part that the budget leaves out are neither.
On a CPU all sizes are tiny: it shows that everything runs."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fgd.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_loss, of_step, of_gpu = (
        commands.add_parser(name, description=text, help=text.split(":")[0])
        for name, text in (("loss", _LOSS), ("step", _STEP), ("gpu", _GPU))
    )
    _add_loss(of_loss)
    _add_step(of_step)
    of_gpu.add_argument("--budget", type=_count, default=gpu.BUDGET, help="seconds for all parts")
    of_gpu.add_argument("--device", default="cuda")
    for command in (of_loss, of_step, of_gpu):
        command.add_argument(
            "--threads", type=_count, default=available_cores(), help="of PyTorch on the CPU"
        )
        command.add_argument("--output", type=Path, default=Path("output/bench"), help="folder")
    of_step.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser


def _add_loss(of_loss: argparse.ArgumentParser) -> None:
    defaults = loss.Settings()
    of_loss.add_argument("--pyramids", nargs="+", choices=PYRAMIDS, default=list(PYRAMIDS))
    of_loss.add_argument("--channels", type=_count, default=defaults.channels)
    of_loss.add_argument(
        "--boxes", type=_count, nargs="+", default=list(defaults.boxes), help="per image"
    )
    of_loss.add_argument("--rounds", type=_count, default=defaults.rounds)
    of_loss.add_argument(
        "--dtype",
        choices=("float32", "float64", "float16", "bfloat16"),
        default=defaults.dtype,
        help="of the feature maps",
    )
    _add_shape(of_loss)


def _add_step(of_step: argparse.ArgumentParser) -> None:
    of_step.add_argument("--config-file", required=True, help="a distillation config")
    of_step.add_argument("--boxes", type=_count, default=10, help="per image")
    of_step.add_argument("--rounds", type=_count, default=5)
    of_step.add_argument(
        "--method",
        nargs="+",
        default=[],
        help="values of MODEL.DISTILLER.METHOD to compare; the config's own by default",
    )
    of_step.add_argument(
        "--teachers",
        action=argparse.BooleanOptionalAction,
        help="the teacher's variants too; by default with a single method",
    )
    _add_shape(of_step)


def _add_shape(command: argparse.ArgumentParser) -> None:
    defaults = loss.Settings()
    command.add_argument(
        "--size",
        type=_count,
        nargs=2,
        default=defaults.size,
        metavar=("H", "W"),
        help="pixels of the (padded) images",
    )
    command.add_argument("--batch", type=_count, default=defaults.batch)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def run_loss(args: argparse.Namespace) -> int:
    settings = loss.Settings(
        size=tuple(args.size),
        batch=args.batch,
        channels=args.channels,
        boxes=tuple(sorted(set(args.boxes))),
        rounds=args.rounds,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
    )
    machine = describe_machine(torch.device(args.device))
    runs = []
    for run in loss.measure_all(settings, args.pyramids, machine["load_average"]):
        runs.append(loss_report.judge(run))
        print(loss_report.table(runs[-1]), flush=True)
    _write_json(
        args.output / "loss.json", {"machine": machine, "allocators": ALLOCATORS, "runs": runs}
    )
    figure = loss_report.plot(runs)
    atomic_write(str(args.output / "loss.png"), lambda file: figure.savefig(file, format="png"))
    return 0


def run_step(args: argparse.Namespace) -> int:
    methods, opts = _split(args.method)
    cfg = load_config(args.config_file, ["MODEL.DEVICE", args.device, *opts, *args.opts])
    machine = describe_machine(torch.device(args.device))
    settings = step.Settings(
        size=tuple(args.size),
        batch=args.batch,
        boxes=args.boxes,
        rounds=args.rounds,
        threads=args.threads,
        methods=methods,
        variants=args.teachers,
    )
    run = run_alone(step.measure, cfg, settings, machine["load_average"])
    run["settings"]["config"] = args.config_file
    print(step_report.table(run))
    _write_json(args.output / "step.json", {"machine": machine, **run})
    return 0


def run_gpu(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    settings = gpu.Settings(args.device, args.threads, tiny=device.type == "cpu")

    def save(run: Dict[str, Any]) -> None:
        _write_json(args.output / "gpu.json", run)
        _write(args.output / "gpu.md", gpu_report.table(run))

    run = gpu.measure(settings, describe_machine(device), args.budget, save)
    print(gpu_report.table(run))
    return gpu_report.exit_code(run["parts"])


def _split(words: Sequence[str]) -> Tuple[Tuple[str, ...], Sequence[str]]:
    """Methods, and the KEY VALUE pairs after them: to argparse these are more methods."""
    keys = [i for i, word in enumerate(words) if "." in word]
    end = keys[0] if keys else len(words)
    return tuple(words[:end]), words[end:]


def _write_json(path: Path, content: Dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    atomic_write(str(path), lambda file: file.write(text.encode()))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one benchmark; 0 even where a goal is missed, 2 for an error of the user's, and of
    ``gpu`` 1 or 4 (`gpu_report.exit_code`)."""
    args = build_parser().parse_args(argv)
    try:
        check_device(args.device, "--device")
        check_output_dir(str(args.output))
        return {"loss": run_loss, "step": run_step, "gpu": run_gpu}[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
