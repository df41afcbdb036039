"""The training loop: Detectron2's, with exact resume, CPU processes and a stop on divergence."""

import logging
import os
import weakref
from contextlib import nullcontext
from typing import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.evaluation import (
    DatasetEvaluators,
)
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from .. import compat
from ..data.second_images import check_teacher_of
from ..data.stream import TrainStream, build_train_stream
from ..data.unlabeled import FOLDER
from ..distillation.config import needs_teacher, wants_second_images
from ..distillation.unlabeled import wants_unlabeled
from ..errors import DivergedError, StoppedError
from ..files import remove_stale_temporaries
from ..processes import rng
from ..processes.stop import StopBetweenSteps
from ..processes.together import check_alike, on_every_process, on_main_process
from ..weights import load_complete, weights_sha256
from . import evaluation, run_folder, solver
from .adaptive import adaptive_hooks
from .average import Average
from .best import KeepBest, check_metric
from .checkpoint import TrainingCheckpointer, student_of
from .header import describe_run
from .history import ContinueMetrics, repair_metrics
from .hooks import LogLevelTotals, SavePeriodically
from .same_start import describe_start
from .step import RunningStatistics, build_step

logger = logging.getLogger(__name__)


class _NoTraceback(logging.Filter):
    """Detectron2's loop logs a traceback for any exception; those with an exit code need none."""

    def filter(self, record):
        if record.exc_info and hasattr(record.exc_info[1], "exit_code"):
            record.exc_info = None
            record.msg, record.args = "Training stopped.", ()
        return True


class FGDTrainer(DefaultTrainer):
    """Trains a plain detector or a Distiller; checkpoints hold the plain student.

    The config's datasets must be registered. All ranks build it together.

    Args:
        extra_hooks: run before those that write what has been logged.
    """

    def __init__(self, cfg: CfgNode, extra_hooks: Sequence[HookBase] = ()):
        # Not DefaultTrainer's constructor: its DDP wrapper needs CUDA and its checkpointer saves
        # the model as it is.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        solver.check_solver(cfg)
        check_metric(cfg)
        logging.getLogger("detectron2.engine.train_loop").addFilter(_NoTraceback())
        if comm.is_main_process():
            remove_stale_temporaries(cfg.OUTPUT_DIR)
        model, optimizer, self.stream, header = on_every_process(lambda: self._parts(cfg))
        check_alike(lambda: describe_start(cfg, header))
        self._trainer = build_step(cfg, compat.wrap_ddp(model), self.stream, optimizer)
        self._statistics = RunningStatistics(model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        decay = cfg.SOLVER.EMA_DECAY
        self.average = Average(student_of(model), decay) if decay else None
        self.checkpointer = TrainingCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            header=header,
            trainer=weakref.proxy(self),
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            average=self.average,
        )
        self.best = KeepBest(cfg, self.checkpointer)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self._finished = 0  # iterations
        self.resumed_from = ""
        self.cfg, self.extra_hooks = cfg, extra_hooks
        self.register_hooks(self.build_hooks())
        logger.info(describe_distillation(model))
        if decay:
            logger.info(f"SOLVER.EMA_DECAY {decay}: the student's average is evaluated and saved")

    def _parts(self, cfg: CfgNode) -> tuple:
        """All that can fail in one process alone: files are read, on each machine its own."""
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        stream = self.build_train_loader(cfg)
        return model, optimizer, stream, describe_run(cfg, stream.unlabeled)

    def resume_or_load(
        self, resume: bool = True, *, allow_changes: bool = False, overwrite: bool = False
    ) -> None:
        """Continue the run in OUTPUT_DIR, or start one from MODEL.WEIGHTS ("" = from scratch).

        Args:
            allow_changes: continue although the config alters the training.
            overwrite: delete another run's files in OUTPUT_DIR and start anew.
        Raises:
            UserError: see `TrainingCheckpointer.resume_newest`; OUTPUT_DIR holds another run; or
                MODEL.WEIGHTS has nothing for the student.
        """
        fresh = [dict(group, params=None) for group in self.optimizer.param_groups]
        base_lrs = list(self.scheduler.base_lrs)
        resumed = self.checkpointer.resume_newest(allow_changes=allow_changes) if resume else None
        if resumed:
            self.start_iter = self.stream.start = self._finished = self.iter + 1
            self.best.resume(resumed)
            self.resumed_from = resumed.path
            if resumed.changed:
                self._adopt_solver(fresh, base_lrs)
        else:
            self._start_anew(resume, overwrite)

    def _start_anew(self, resume: bool, overwrite: bool) -> None:
        folder = self.cfg.OUTPUT_DIR
        if resume:
            logger.info(f"--resume: {folder} has no checkpoint yet, starting anew")
        elif overwrite:
            on_main_process(lambda: run_folder.delete_run(folder))
        on_main_process(lambda: run_folder.check_unused(folder))
        on_every_process(lambda: load_student_weights(self.model, self.cfg.MODEL.WEIGHTS))
        if hasattr(compat.unwrap(self.model), "inherit_from_teacher"):
            compat.unwrap(self.model).inherit_from_teacher()
        if self.average is not None:
            self.average.restart()

    def _adopt_solver(self, groups: list, base_lrs: list) -> None:
        """Learning rate, decay and momentum of the config instead of the checkpoint's."""
        self.scheduler.base_lrs = base_lrs
        rates = self.scheduler.get_lr()
        for group, fresh, rate in zip(self.optimizer.param_groups, groups, rates, strict=True):
            group.update(fresh, params=group["params"], lr=rate)

    def _repair_metrics(self) -> None:
        path, last = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter - 1
        written = on_main_process(lambda: repair_metrics(path, last))
        self._continue_metrics.written = written

    def train(self):
        """Train to the end.

        Raises:
            StoppedError: a signal asked for it; the state is saved. All ranks raise it.
            DivergedError: see `run_step`.
        """
        # What a method draws follows from it, in a resumed run too.
        compat.unwrap(self.model).seed = self.stream.seed
        # Not when resuming: a run with nothing left to do keeps the line of its last evaluation.
        self._repair_metrics()
        try:
            # TorchScript (RetinaNet's focal loss) rewrites a function after its first calls, with
            # other rounding, so a new process would not continue bit by bit. Without a seed speed
            # goes first.
            with torch.jit.optimized_execution(self.cfg.SEED < 0):
                return self._finish() if self.is_complete else super().train()
        except StoppedError as stopped:
            raise StoppedError(f"{stopped} {self._save_stopped()}") from None

    def _finish(self) -> None:
        """Do what follows the last step and a kill has prevented: evaluate and write metrics."""
        with EventStorage(self.start_iter) as self.storage:
            self.iter = self.start_iter
            self.before_train()
            self.after_train()

    def _save_stopped(self) -> str:
        """Save what no periodic checkpoint has; says at which iteration and where it is."""
        done = self._finished
        where = f"at iteration {done} of {self.max_iter}"
        if done == self.start_iter:
            return f"{where}, before a step was done"
        if self.checkpointer.last_saved != done - 1:
            self.checkpointer.save(f"model_{done - 1:07d}", iteration=done - 1)
        comm.synchronize()  # a rank that left now would be taken for a failure while another saves
        return f"{where}, all saved in {self.cfg.OUTPUT_DIR}"

    @property
    def stop_signal(self) -> str:
        """The signal that some rank had received by this step's loss; "" if there was none."""
        return self._trainer.stop_signal

    @property
    def is_complete(self) -> bool:
        """Whether the resumed run has nothing left to do."""
        return self.start_iter >= self.max_iter

    @property
    def last_results(self) -> dict:
        """Metrics of the last evaluation; {} before the first, or without DATASETS.TEST."""
        return getattr(self, "_last_eval_results", {})

    def run_step(self) -> None:
        """One step, or, with a loss that is NaN or infinite on any rank, none on all ranks.

        Raises:
            DivergedError: with losses and images; the weights of before are in a file it names.
        """
        self._statistics.keep()
        try:
            super().run_step()
        except FloatingPointError as error:  # also Detectron2's own, e.g. from the RPN
            self._statistics.restore()
            raise DivergedError(
                f"iteration {self.iter}: {' '.join(str(error).split())}. "
                f"{self._save_diverged(together=isinstance(error, DivergedError))}Usual causes: "
                "SOLVER.BASE_LR too high, too short a warm-up, too large distillation weights, or "
                "no pretrained MODEL.WEIGHTS"
            ) from error
        if self.average is not None:
            self.average.update(self.iter)
        self._finished = self.iter + 1

    def _save_diverged(self, *, together: bool) -> str:
        """Write the weights of before the step; a sentence on where, "" on ranks that need not.

        Args:
            together: all ranks are here; otherwise this one alone knows, and the others wait for
                it in some collective.
        """
        text = ""
        if comm.is_main_process() or not together:
            try:
                text = f"Weights before this step: {self.checkpointer.save_diverged(self.iter)}. "
            except (OSError, RuntimeError) as error:  # a full disk must not hide the divergence
                text = f"The weights could not be saved ({error}). "
        if together:
            comm.synchronize()
        return text

    def build_hooks(self) -> list:
        # Before the writers, and before anything is saved.
        adaptive = adaptive_hooks(self.cfg, self.model, len(self.stream.dicts))
        ret = [*adaptive, LogLevelTotals(), *self.extra_hooks, *super().build_hooks()]
        # Ours on every rank, in the main process's place: saving gathers what each rank has.
        ret = [x for x in ret if not isinstance(x, hooks.PeriodicCheckpointer)]
        saving = SavePeriodically(
            self.checkpointer,
            self.cfg.SOLVER.CHECKPOINT_PERIOD,
            ignore_errors=self.cfg.SOLVER.IGNORE_SAVE_ERRORS,
        )
        before_eval = next(i for i, x in enumerate(ret) if isinstance(x, hooks.EvalHook))
        own = hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        ret[before_eval : before_eval + 1] = [saving, StopBetweenSteps(), own]
        self._continue_metrics = ContinueMetrics()
        return [*ret, self._continue_metrics]

    def _evaluate(self) -> dict:
        """Evaluate what a checkpoint's model is, and keep it if it is the best.

        Returns:
            What is to be logged: of DATASETS.VALID as "valid"; without that set, and at the end, of
            DATASETS.TEST.
        """
        data, found = self.cfg.DATASETS, {}
        with nullcontext() if self.average is None else self.average.in_use():
            if data.VALID:
                found["valid"] = self.test(evaluation.on_validation_set(self.cfg), self.model)
            if not data.VALID or self._finished >= self.max_iter:
                self._last_eval_results = self.test(self.cfg, self.model)
                found.update(self._last_eval_results)
        self.best.consider(found["valid"] if data.VALID else found, self._finished - 1)
        return found

    def state_dict(self) -> dict:
        # Iteration and hooks, one of which has the schedule. v0.6 saves no more than that.
        ret = TrainerBase.state_dict(self)
        ret["iteration"] = self._finished - 1  # at the end Detectron2 counts one more
        ret["optimizer"] = self.optimizer.state_dict()
        if hasattr(self._trainer, "grad_scaler"):
            ret["grad_scaler"] = self._trainer.grad_scaler.state_dict()
        ret["data_seed"] = self.stream.seed
        return ret

    def load_state_dict(self, state_dict: dict) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if hasattr(self._trainer, "grad_scaler") and "grad_scaler" in state_dict:
            self._trainer.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.stream.seed = state_dict["data_seed"]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return solver.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return solver.build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainStream:
        wanted = wants_second_images(cfg)
        if wanted and needs_teacher(cfg):
            sha256 = weights_sha256(cfg.MODEL.DISTILLER.TEACHER.WEIGHTS)
            check_teacher_of(cfg.DATASETS.TRAIN_SECOND_IMAGES, sha256)
        unlabeled = wants_unlabeled(cfg)
        if cfg.DATASETS.JSON.UNLABELED_IMAGES and not unlabeled:
            logger.info(f"{FOLDER} is not used: no term is distilled")
        return build_train_stream(cfg, second_images=wanted, unlabeled=unlabeled)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> evaluation.StoppableLoader:
        return evaluation.build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        return evaluation.build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        # Evaluation draws random numbers (its loader does); a run resumed after it does not.
        with rng.preserved():
            return super().test(cfg, model, evaluators)


def load_student_weights(model: nn.Module, path: str) -> None:
    """Start the student from ``path``, typically a backbone's; "" leaves its own initialisation.

    Raises:
        UserError: the file is unusable or not one tensor of it fits the student.
    """
    if not path:
        logger.info('MODEL.WEIGHTS is "": the student starts as built (MODEL.TIMM.PRETRAINED)')
        return
    report = load_complete(student_of(model), path, what="student", allow_partial=True)
    logger.info(f"Student starts from {path}: {report.summary()}")


def describe_distillation(model: nn.Module) -> str:
    """One line for the log: is distillation on, and with what."""
    model = compat.unwrap(model)
    if hasattr(model, "describe"):
        return model.describe()
    return f"Distillation is OFF: plain {type(model).__name__}"
