"""The training loop: Detectron2's, with exact resume, CPU processes and a stop on divergence."""

import logging
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm
from torch import nn

from . import compat, rng, solver
from .checkpoint import TrainingCheckpointer, describe_run, remove_stale_temporaries, student_of
from .data.stream import TrainStream, build_train_stream
from .errors import DivergedError
from .hooks import LogLevelTotals
from .visualize.hook import picture_hooks
from .weights import load_complete

logger = logging.getLogger(__name__)


class StopTogether:
    """Mixin for Detectron2's step trainers: no rank steps with a loss that is NaN or infinite.

    Detectron2 finds out on the main process only, while the others step and later wait for it. Both
    versions call ``_write_metrics`` between backward and the optimizer's step.
    """

    def _write_metrics(self, loss_dict, data_time, *args, **kwargs):
        check_finite(loss_dict)
        super()._write_metrics(loss_dict, data_time, *args, **kwargs)


class _SimpleStep(StopTogether, SimpleTrainer):
    pass


class _AMPStep(StopTogether, AMPTrainer):
    pass


def check_finite(loss_dict: dict) -> None:
    """Raise on every rank if the total loss of any rank is NaN or infinite.

    Raises:
        DivergedError: lists each loss of this rank and the ranks concerned.
    """
    losses = {name: value.detach() for name, value in loss_dict.items()}
    finite = torch.isfinite(sum(losses.values())).item()
    ranks = [rank for rank, ok in enumerate(comm.all_gather(finite)) if not ok]
    if ranks:
        table = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        where = f" on rank {', '.join(map(str, ranks))}" if comm.get_world_size() > 1 else ""
        raise DivergedError(f"a loss became infinite or NaN{where} ({table})")


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
    """

    def __init__(self, cfg: CfgNode):
        # Not DefaultTrainer's constructor: its DDP wrapper needs CUDA and its checkpointer saves
        # the model as it is.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        solver.check_solver(cfg)
        logging.getLogger("detectron2.engine.train_loop").addFilter(_NoTraceback())
        if comm.is_main_process():
            remove_stale_temporaries(cfg.OUTPUT_DIR)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.stream = self.build_train_loader(cfg)
        step = _AMPStep if cfg.SOLVER.AMP.ENABLED else _SimpleStep
        self._trainer = step(compat.wrap_ddp(model), self.stream, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = TrainingCheckpointer(
            model, cfg.OUTPUT_DIR, header=describe_run(cfg), trainer=weakref.proxy(self)
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())
        logger.info(describe_distillation(model))

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue the run in OUTPUT_DIR, or start one from MODEL.WEIGHTS ("" = from scratch).

        Raises:
            UserError: see `TrainingCheckpointer`; or MODEL.WEIGHTS has nothing for the student.
        """
        path = self.checkpointer.get_checkpoint_file() if resume else ""
        if path:
            self.checkpointer.resume(path)
            self.start_iter = self.stream.start = self.iter + 1
            return
        if resume:
            logger.info(f"--resume: {self.cfg.OUTPUT_DIR} has no checkpoint yet, starting anew")
        self.checkpointer.forget_earlier_run()
        load_student_weights(self.model, self.cfg.MODEL.WEIGHTS)
        if hasattr(compat.unwrap(self.model), "inherit_from_teacher"):
            compat.unwrap(self.model).inherit_from_teacher()

    def train(self):
        # TorchScript (RetinaNet's focal loss) rewrites a function after its first calls, with other
        # rounding, so a new process would not continue bit by bit. Without a seed speed goes first.
        with torch.jit.optimized_execution(self.cfg.SEED < 0):
            return super().train()

    @property
    def is_complete(self) -> bool:
        """Whether the resumed run has nothing left to do."""
        return self.start_iter >= self.max_iter

    @property
    def last_results(self) -> dict:
        """Metrics of the last evaluation; {} before the first, or without DATASETS.TEST."""
        return getattr(self, "_last_eval_results", {})

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as error:  # also Detectron2's own, e.g. from the RPN
            raise DivergedError(
                f"iteration {self.iter}: {' '.join(str(error).split())}. Usual causes: "
                "SOLVER.BASE_LR too high, too short a warm-up, too large distillation weights, or "
                "no pretrained MODEL.WEIGHTS"
            ) from error

    def build_hooks(self) -> list:
        # Before the writers.
        ret = [LogLevelTotals(), *picture_hooks(self.cfg), *super().build_hooks()]
        if not comm.is_main_process():
            # Saving gathers the random number states of all ranks; keep the main process's order.
            before_eval = next(i for i, x in enumerate(ret) if isinstance(x, hooks.EvalHook))
            period = self.cfg.SOLVER.CHECKPOINT_PERIOD
            ret.insert(before_eval, hooks.PeriodicCheckpointer(self.checkpointer, period))
        return ret

    def state_dict(self) -> dict:
        # Iteration and hooks, one of which has the schedule. v0.6 saves no more than that.
        ret = TrainerBase.state_dict(self)
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
        return build_train_stream(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """COCO's evaluator, or Pascal VOC's for sets registered as such."""
        if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        return COCOEvaluator(
            dataset_name, output_dir=folder, use_fast_impl=compat.has_fast_coco_eval()
        )

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
        logger.info('MODEL.WEIGHTS is "": the student starts from its random initialisation')
        return
    report = load_complete(student_of(model), path, what="student", allow_partial=True)
    logger.info(f"Student starts from {path}: {report.summary()}")


def describe_distillation(model: nn.Module) -> str:
    """One line for the log: is distillation on, and with what."""
    model = compat.unwrap(model)
    if hasattr(model, "describe"):
        return model.describe()
    return f"Distillation is OFF: plain {type(model).__name__}"
