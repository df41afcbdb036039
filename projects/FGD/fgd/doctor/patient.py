"""What is examined: the model that is about to be trained, its optimizer and its batches."""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .. import compat
from ..data.stream import TrainStream
from ..engine import solver
from ..engine.trainer import FGDTrainer, load_student_weights


@dataclass
class Patient:
    """A model before its first step.

    Attributes:
        cfg: with registered datasets. model: unwrapped, plain or Distiller; ``wrapped``: as it is
            trained. stream: of the batches that the training will get.
    """

    cfg: CfgNode
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    stream: TrainStream

    @classmethod
    def of(cls, trainer: FGDTrainer) -> "Patient":
        """What the trainer has, ready for step one."""
        wrapped = trainer._trainer.model
        return cls(trainer.cfg, compat.unwrap(wrapped), wrapped, trainer.optimizer, trainer.stream)

    @classmethod
    def build(cls, cfg: CfgNode, stream: TrainStream) -> "Patient":
        """The same without a trainer: nothing in OUTPUT_DIR is touched."""
        model = build_model(cfg)
        optimizer = solver.build_optimizer(cfg, model)
        load_student_weights(model, cfg.MODEL.WEIGHTS)
        if hasattr(model, "inherit_from_teacher"):
            model.inherit_from_teacher()
        return cls(cfg, model, model, optimizer, stream)
