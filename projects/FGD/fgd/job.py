"""What each process of the command ``train_net.py`` does: check, set up, train or evaluate."""

import argparse
import json
import logging
import math
import os
from typing import Callable, Dict, Optional

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.modeling import build_model
from detectron2.utils import comm

from .config import check_config, check_device, checkpoint_config, load_config
from .console import set_up_loggers
from .data.checks import check_class_count, class_names, matched_by_name
from .data.contents import describe_names, shared_images
from .data.datasets import register_from_config
from .data.settings import check_images, check_sets
from .distillation.lazy_teacher import trust
from .doctor import command as doctor
from .engine.evaluation import check_same_ap
from .engine.results import EVALUATED, FINAL, RESULTS, evaluated_otherwise, read_results, without_ap
from .engine.run_folder import check_unused, config_kept, newest_checkpoint
from .engine.same_start import describe_data, shared_values
from .engine.trainer import FGDTrainer
from .errors import UserError
from .files import atomic_write, check_output_dir
from .processes.lock import folder_lock
from .processes.together import check_alike, on_every_process, on_main_process
from .trained_with import other_config
from .visualize.hook import picture_hooks
from .weights import load_complete, weights_sha256

START = "start.json"  # of --starts-as
# Options by which processes do different things one after the other.
_MODES = ("eval_only", "resume", "overwrite", "doctor", "balance", "starts_as")

logger = logging.getLogger(__name__)


def load_checked_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config of the command line.

    Raises:
        UserError: it cannot work here; found before anything is built or written.
    """
    doctor.check_options(args)
    if args.starts_as and (args.eval_only or args.doctor):
        raise UserError("--starts-as belongs to a training")
    cfg = load_config(args.config_file, args.opts or ())
    trust(args.trust_config, cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE)
    check_device(cfg.MODEL.DEVICE)
    check_images(cfg)
    if not args.eval_only:
        check_config(cfg)
    cfg.freeze()
    return cfg


def run(args: argparse.Namespace) -> int:
    """What each process of the job does; returns the exit code 0."""
    cfg = on_every_process(lambda: load_checked_config(args))
    check_alike(lambda: {name: getattr(args, name) for name in _MODES} | shared_values(cfg))
    on_every_process(lambda: check_output_dir(cfg.OUTPUT_DIR))
    if args.eval_only:
        return evaluate(prepare(cfg, args), resume=args.resume)
    if args.doctor:
        return doctor.examine_only(prepare(cfg, args))
    with folder_lock(cfg.OUTPUT_DIR), config_kept(cfg.OUTPUT_DIR) as accept:
        if not (args.resume or args.overwrite):
            on_every_process(lambda: check_unused(cfg.OUTPUT_DIR))
        prepared = prepare(cfg, args)
        if args.balance:
            prepared = doctor.apply_balance(prepared, cfg, resume=args.resume)
        return train(
            prepared,
            accept,
            resume=args.resume,
            starts_as=args.starts_as,
            allow_changes=args.allow_config_change,
            overwrite=args.overwrite,
        )


def prepare(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """`set_up`; then the config with registered datasets whose classes fit the model.

    All processes call it together, and an error of one is raised by all.
    """

    def registered() -> CfgNode:
        set_up(cfg, args)
        check_sets(cfg, training=not args.eval_only)
        splits = ("TEST",) if args.eval_only else ("TRAIN", "TEST", "VALID")
        found = register_from_config(cfg, splits)
        if not args.doctor:  # which says it beside everything else
            check_class_count(found)
        return found

    return on_every_process(registered)


def set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Loggers; for training also the seed and OUTPUT_DIR/config.yaml.

    Evaluation and doctor leave that file alone: it is the record of the training, and exporting
    reads it.
    """
    set_up_loggers(cfg.OUTPUT_DIR)
    if not (args.eval_only or args.doctor):
        default_setup(cfg, args)


def train(
    cfg: CfgNode,
    accept: Callable[[], None] = lambda: None,
    *,
    resume: bool = False,
    starts_as: str = "",
    **options,
) -> int:
    """Train to SOLVER.MAX_ITER, evaluate and write OUTPUT_DIR/results.json; returns 0.

    Args:
        accept: called when nothing stands against the run.
        starts_as: see `check_start`; "" = no check.
        resume, options: as `FGDTrainer.resume_or_load` takes them.
    """
    trainer = FGDTrainer(cfg, picture_hooks(cfg))
    trainer.resume_or_load(resume, **options)
    accept()
    if trainer.is_complete:
        done, wanted = trainer.start_iter, trainer.max_iter
        logger.info(f"Training already complete (iteration {done} of {wanted})")
        final = os.path.basename(trainer.resumed_from) == FINAL
        if final and on_main_process(lambda: has_results(cfg)):
            return 0
        if not final:  # killed just before it, or MAX_ITER was lowered
            trainer.checkpointer.save("model_final", iteration=trainer.iter)
    else:
        say_if_shared(cfg)
        if starts_as and trainer.start_iter == 0:
            check_start(trainer, starts_as)
        doctor.before_step_one(trainer)
    trainer.train()
    done = max(trainer.start_iter, trainer.max_iter)
    write_results(cfg, trainer.last_results, done, os.path.join(cfg.OUTPUT_DIR, FINAL))
    return 0


def say_if_shared(cfg: CfgNode) -> None:
    """Warn, in the main process, of images that two of the sets share."""
    text = shared_images(cfg) if comm.is_main_process() else ""
    if text:
        logger.warning(text)


def has_results(cfg: CfgNode) -> bool:
    """Whether OUTPUT_DIR has the results of its model_final.pth on this test data.

    Those of earlier versions, which do not say what they are of, are taken for it.
    """
    path = os.path.join(cfg.OUTPUT_DIR, RESULTS)
    if not os.path.exists(path):
        return False
    fault = evaluated_otherwise(
        read_results(path), os.path.join(cfg.OUTPUT_DIR, FINAL), tested(cfg)
    )
    if fault:
        logger.warning(f"{path} {fault}; it is evaluated again")
    return not fault


def check_start(trainer: FGDTrainer, path: str) -> None:
    """--starts-as: evaluate before step one, and write OUTPUT_DIR/start.json as results.json is.

    Args:
        path: results.json of the run that this one starts from.
    Raises:
        UserError: in every process: it cannot be read, or its AP is not that of this start.
    """
    found = trainer.test(trainer.cfg, trainer.model)
    write_results(trainer.cfg, found, 0, name=START)
    on_main_process(lambda: check_same_ap(_without_nan(found), path))
    logger.info(f"The run starts with the AP of {path}")


def evaluate(cfg: CfgNode, *, resume: bool = False) -> int:
    """Evaluate MODEL.WEIGHTS (or, with resume, the last checkpoint) on DATASETS.TEST; returns 0.

    Only the student is built, so no teacher is needed.

    Raises:
        UserError: the weights are not complete, or were trained for other classes or other images.
    """
    path = cfg.MODEL.WEIGHTS
    if resume:
        found = on_every_process(lambda: newest_checkpoint(cfg.OUTPUT_DIR))
        path = found[0] if found else path
    if not path:
        raise UserError("--eval-only: name the checkpoint to evaluate with MODEL.WEIGHTS")
    model = build_model(checkpoint_config(cfg))
    report = on_every_process(lambda: load_complete(model, path, what="model"))
    check_alike(lambda: {"MODEL.WEIGHTS": weights_sha256(path), **describe_data(cfg)})
    logger.info(f"Evaluating {path}: {report.summary()}")
    said = other_config(path, report.config, cfg)
    if said:
        logger.warning(said)
    if not report.classes:
        logger.info(f"{path} names no classes: those of the data are taken for its own")
    with matched_by_name(cfg, report.classes or class_names(cfg)):
        results = FGDTrainer.test(cfg, model)
    iterations = None if report.iteration is None else report.iteration + 1
    write_results(cfg, results, iterations, path)
    return 0


def write_results(
    cfg: CfgNode, results: dict, iterations: Optional[int], weights: str = "", name: str = RESULTS
) -> None:
    """Write results.json in OUTPUT_DIR.

    {"iteration": finished iterations or null, "evaluated": {"weights": SHA-256 of the file,
    "annotations" and "images": digests of the test data}, "bbox": {"AP": ...}, ...}. Metrics are in
    percent; null where a metric is undefined (no ground truth of that size). With several test sets
    there is one such entry per set name. Only the main process writes.

    Args:
        cfg: with registered datasets. weights: the file that was evaluated, "" = none.
    """
    if not comm.is_main_process():
        return
    evaluated = {"weights": weights_sha256(weights)} if weights else {}
    content = {"iteration": iterations, EVALUATED: {**evaluated, **tested(cfg)}}
    content.update(_without_nan(results))
    for kind in without_ap(content):
        logger.warning(f"{kind} has no AP, which is null in {name}: nothing was detected")
    text = json.dumps(content, indent=1)
    atomic_write(os.path.join(cfg.OUTPUT_DIR, name), lambda file: file.write(text.encode()))


def tested(cfg: CfgNode) -> Dict[str, str]:
    """Digests of DATASETS.TEST, whose sets are registered; {} without any."""
    return describe_names(cfg.DATASETS.TEST)


def _without_nan(value):
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if math.isnan(value) else float(value)
