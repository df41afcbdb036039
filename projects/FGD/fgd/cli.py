"""The command ``train_net.py``: train, resume or evaluate a detector, distilled or not."""

import argparse
import os
import shlex
import sys
import traceback
from typing import Optional, Sequence

from detectron2.engine import default_argument_parser

from .doctor import command as doctor
from .errors import StoppedError
from .job import load_checked_config, run
from .processes import stop
from .processes.launch import TIMEOUT, WorkerError, launch, one_line, under_torchrun

_EPILOG = """
Examples:

Distil a student on 8 GPUs, and go on after an interruption:
    $ train_net.py --config-file configs/fgd_frcnn.yaml --num-gpus 8
    $ train_net.py --config-file configs/fgd_frcnn.yaml --num-gpus 8 --resume

One GPU: divide batch and learning rate by 8:
    $ train_net.py --config-file configs/fgd_frcnn.yaml SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0025

Your own COCO-format data:
    $ train_net.py --config-file configs/fgd_retinanet.yaml MODEL.RETINANET.NUM_CLASSES 3 \\
        DATASETS.JSON.TRAIN train.json DATASETS.JSON.TEST test.json

Is everything as it should be? Check, and train nothing:
    $ train_net.py --config-file configs/fgd_frcnn.yaml --doctor

Start anew in the folder of another run, which is deleted:
    $ train_net.py --config-file configs/fgd_frcnn.yaml --overwrite

Evaluate a checkpoint:
    $ train_net.py --config-file output/config.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

Without a GPU; --num-gpus then counts processes:
    $ train_net.py --config-file configs/fgd_retinanet.yaml --num-gpus 2 MODEL.DEVICE cpu

Two machines with 8 GPUs each:
    (0)$ train_net.py --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST0:29500
    (1)$ train_net.py --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://HOST0:29500

SIGTERM, SIGUSR1 and Ctrl-C end a run after its step and a checkpoint; a second Ctrl-C at once.

Exit codes: 0 done, 1 unexpected error, 2 usage, config, path, data or weights, 3 diverged,
75 stopped by a signal with all saved, 130 stopped at once.
"""


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's options, and ours."""
    parser = default_argument_parser(epilog=_EPILOG)
    parser.set_defaults(dist_url="auto")
    parser.add_argument("--debug", action="store_true", help="print tracebacks of all errors")
    doctor.add_options(parser)
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="with --resume: go on although the config alters the training",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="without --resume: delete another run's files in OUTPUT_DIR and start anew",
    )
    parser.add_argument(
        "--starts-as",
        default="",
        metavar="RESULTS",
        help="evaluate what a new run starts from, write OUTPUT_DIR/start.json, and stop unless "
        "its AP is that of this results.json",
    )
    parser.add_argument(
        "--trust-config",
        default="",
        metavar="FILE.py",
        help="execute this LazyConfig file, and what it imports, as "
        "MODEL.DISTILLER.TEACHER.CONFIG_FILE",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long a process waits for the others before the job fails (default: %(default)s)",
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command and return its exit code; an error is one line on stderr."""
    args = build_parser().parse_args(argv)
    try:
        with stop.listening():
            # Read once before processes are started, so that a mistake is reported once.
            device = load_checked_config(args).MODEL.DEVICE
            return launch(
                run,
                (args,),
                device=device,
                processes=args.num_gpus,
                machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                timeout=args.timeout,
            )
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        if code == StoppedError.exit_code:
            if not under_torchrun() or os.environ["RANK"] == "0":
                command = command_to_go_on(argv)
                write_line(f"{one_line(error)}; go on with: {command}")
            return code
        write_line(f"error: {one_line(error)}")
        if code == 1 or args.debug:
            details = error.details if isinstance(error, WorkerError) else traceback.format_exc()
            print(details, file=sys.stderr)
        return code


def write_line(line: str) -> None:
    """Write a line to stderr as a whole; print() writes the line break by itself, and the lines of
    two machines' processes on one stderr (srun) would run together.
    """
    sys.stderr.write(f"{line}\n")


def command_to_go_on(argv: Optional[Sequence[str]] = None) -> str:
    """The command line of this process, for a shell in the same folder, with --resume.

    Under torchrun, torchrun's; other launchers (srun) are not part of it.
    """
    words = sys.orig_argv if argv is None else [os.path.basename(sys.argv[0]), *argv]
    own = len(sys.argv[1:] if argv is None else argv)
    if under_torchrun() and os.path.exists(f"/proc/{os.getppid()}/cmdline"):
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            words = os.fsdecode(file.read()).split("\0")[:-1]
    program, options = words[: len(words) - own], words[len(words) - own :]
    options = [x for x in options if x not in ("--resume", "--overwrite")]
    return shlex.join([*program, "--resume", *options])
