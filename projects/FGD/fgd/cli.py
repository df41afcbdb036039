"""The command ``train_net.py``: train, resume or evaluate a detector, distilled or not."""

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import traceback
from typing import Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .checkpoint import atomic_write, last_checkpoint
from .config import check_config, load_config, student_config
from .data.checks import check_class_count
from .data.datasets import register_from_config
from .errors import UserError
from .launch import WorkerError, launch, one_line
from .solver import check_solver
from .trainer import FGDTrainer
from .weights import load_complete

RESULTS = "results.json"

logger = logging.getLogger(__name__)

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

Evaluate a checkpoint:
    $ train_net.py --config-file output/config.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

Without a GPU; --num-gpus then counts processes:
    $ train_net.py --config-file configs/fgd_retinanet.yaml --num-gpus 2 MODEL.DEVICE cpu

Two machines with 8 GPUs each:
    (0)$ train_net.py --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST0:29500
    (1)$ train_net.py --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://HOST0:29500

Exit codes: 0 done, 1 unexpected error, 2 usage, config, path, data or weights, 3 diverged.
"""


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's options, and --debug."""
    parser = default_argument_parser(epilog=_EPILOG)
    parser.set_defaults(dist_url="auto")
    parser.add_argument("--debug", action="store_true", help="print tracebacks of all errors")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command and return its exit code; an error is one line on stderr."""
    args = build_parser().parse_args(argv)
    try:
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
        )
    except KeyboardInterrupt:
        print("error: interrupted; continue with --resume", file=sys.stderr)
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        print(f"error: {one_line(error)}", file=sys.stderr)
        if code == 1 or args.debug:
            details = error.details if isinstance(error, WorkerError) else traceback.format_exc()
            print(details, file=sys.stderr)
        return code


def load_checked_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config of the command line.

    Raises:
        UserError: it cannot work here; found before anything is built or written.
    """
    cfg = load_config(args.config_file, args.opts or ())
    check_device(cfg.MODEL.DEVICE)
    if not args.eval_only:
        check_solver(cfg)
        check_config(cfg)
    cfg.freeze()
    return cfg


def check_device(device: str) -> None:
    """Raise UserError if PyTorch does not know MODEL.DEVICE or there is no such device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"MODEL.DEVICE: {device!r} is not a device; use cuda or cpu") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("MODEL.DEVICE is cuda, but PyTorch finds no GPU; add MODEL.DEVICE cpu")


def check_output_dir(path: str) -> None:
    """Create OUTPUT_DIR and write to it once; UserError if that fails."""
    if not path or "://" in path:
        raise UserError(f"OUTPUT_DIR: {path!r} is not a local folder")
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {path}: cannot write there ({error.strerror})") from None


def run(args: argparse.Namespace) -> int:
    """What each process of the job does; returns the exit code 0."""
    cfg = load_checked_config(args)
    check_output_dir(cfg.OUTPUT_DIR)
    set_up(cfg, args)
    cfg = register_from_config(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    check_class_count(cfg)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    return train(cfg, resume=args.resume)


def set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Loggers; for training also the seed and OUTPUT_DIR/config.yaml.

    Evaluation leaves that file alone: it is the record of the training, and exporting reads it.
    """
    names = ["fgd"]
    if args.eval_only:
        names += ["fvcore", "detectron2"]
    else:
        default_setup(cfg, args)  # makes those two itself
    for name in names:
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)


def train(cfg: CfgNode, *, resume: bool = False) -> int:
    """Train to SOLVER.MAX_ITER, evaluate and write OUTPUT_DIR/results.json; returns 0."""
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if trainer.is_complete:
        done, wanted = trainer.start_iter, trainer.max_iter
        logger.info(f"Training already complete (iteration {done} of {wanted})")
        if os.path.exists(os.path.join(cfg.OUTPUT_DIR, RESULTS)):
            return 0
        results = trainer.test(cfg, trainer.model)  # the run was stopped while it evaluated
    else:
        trainer.train()
        results = trainer.last_results
    write_results(cfg.OUTPUT_DIR, results, trainer.max_iter)
    return 0


def evaluate(cfg: CfgNode, *, resume: bool = False) -> int:
    """Evaluate MODEL.WEIGHTS (or, with resume, the last checkpoint) on DATASETS.TEST; returns 0.

    Only the student is built, so no teacher is needed.

    Raises:
        UserError: the weights are not complete.
    """
    path = cfg.MODEL.WEIGHTS
    if resume:
        path = last_checkpoint(cfg.OUTPUT_DIR) or path
    if not path:
        raise UserError("--eval-only: name the checkpoint to evaluate with MODEL.WEIGHTS")
    model = build_model(student_config(cfg))
    report = load_complete(model, path, what="model")
    logger.info(f"Evaluating {path}: {report.summary()}")
    results = FGDTrainer.test(cfg, model)
    iterations = None if report.iteration is None else report.iteration + 1
    write_results(cfg.OUTPUT_DIR, results, iterations)
    return 0


def write_results(folder: str, results: dict, iterations: Optional[int]) -> None:
    """Write results.json: {"iteration": finished iterations or null, "bbox": {"AP": ...}, ...}.

    Metrics are in percent; null where a metric is undefined (no ground truth of that size). With
    several test sets there is one such entry per set name. Only the main process writes.
    """
    if not comm.is_main_process():
        return
    content = json.dumps({"iteration": iterations, **_without_nan(results)}, indent=1)
    atomic_write(os.path.join(folder, RESULTS), lambda file: file.write(content.encode()))


def _without_nan(value):
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if math.isnan(value) else float(value)
