"""The doctor's part of train_net.py: --doctor, --balance, and the start of a distilled run."""

import argparse
import logging
import os

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ..config import META_ARCHITECTURE
from ..engine.trainer import FGDTrainer
from ..errors import UserError
from ..files import atomic_write
from .balance import balanced_factor
from .examination import Form, examine
from .patient import Patient

logger = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="check data, teacher and distillation, write OUTPUT_DIR/doctor.json, and stop; exit "
        "code 2 if anything is wrong",
    )
    parser.add_argument(
        "--balance",
        action="store_true",
        help="set MODEL.DISTILLER.FACTOR, once, so that distillation and detection losses start "
        "alike; config.yaml and checkpoints record it",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that exclude each other."""
    for name in ("eval_only", "resume", "balance"):
        if args.doctor and getattr(args, name):
            raise UserError(
                f"--doctor looks at the start of a run: without --{name}".replace("_", "-")
            )
    if args.balance and args.eval_only:
        raise UserError("--balance belongs to a training, --eval-only trains nothing")


def examine_only(cfg: CfgNode) -> int:
    """--doctor: the full form, on a model that is built for it; returns 0.

    Raises:
        UserError: there are faults.
    """
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())  # as training does
    report = examine(cfg, Form.full(cfg))
    if comm.is_main_process():
        warnings = len(report.findings) - sum(x.verdict == "ok" for x in report.findings)
        logger.info(f"Doctor: nothing is wrong, {warnings} warnings")
    return 0


def before_step_one(trainer: FGDTrainer) -> None:
    """The brief form on a new distilled run, unless DOCTOR.BRIEF is False.

    Raises:
        UserError: there are faults.
    """
    cfg = trainer.cfg
    distilled = cfg.MODEL.META_ARCHITECTURE == META_ARCHITECTURE
    if trainer.start_iter == 0 and distilled and cfg.DOCTOR.BRIEF:
        examine(cfg, Form.brief(cfg), Patient.of(trainer))


def apply_balance(cfg: CfgNode, written: CfgNode, *, resume: bool) -> CfgNode:
    """--balance: the config with its factor, which OUTPUT_DIR/config.yaml then has too.

    Args:
        cfg: with registered datasets. written: the same as the user gave it.
    """
    factor = balanced_factor(cfg, resume=resume)
    cfg, written = _with_factor(cfg, factor), _with_factor(written, factor)
    if comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
        atomic_write(path, lambda file: file.write(written.dump().encode()))
    return cfg


def _with_factor(cfg: CfgNode, factor: float) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DISTILLER.FACTOR = factor
    cfg.freeze()
    return cfg
