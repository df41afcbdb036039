"""What is examined: the model that is about to be trained, its optimizer and its batches."""

import copy
from dataclasses import dataclass
from itertools import islice
from typing import List

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .. import compat, solver
from ..data.stream import TrainStream
from ..trainer import FGDTrainer, load_student_weights


@dataclass
class Patient:
    """A model before its first step.

    Attributes:
        cfg: with registered datasets. model: unwrapped, plain or Distiller; ``wrapped``: as it is
            trained. stream: batches as the training will get them; not the trainer's own.
    """

    cfg: CfgNode
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    stream: TrainStream

    @classmethod
    def of(cls, trainer: FGDTrainer) -> "Patient":
        """The trainer's model, ready for step one, and a stream of its own with equal batches."""
        wrapped = trainer._trainer.model
        stream = _own(trainer.stream)
        return cls(trainer.cfg, compat.unwrap(wrapped), wrapped, trainer.optimizer, stream)

    @classmethod
    def build(cls, cfg: CfgNode, stream: TrainStream) -> "Patient":
        """The same without a trainer: nothing in OUTPUT_DIR is touched."""
        model = build_model(cfg)
        optimizer = solver.build_optimizer(cfg, model)
        load_student_weights(model, cfg.MODEL.WEIGHTS)
        if hasattr(model, "inherit_from_teacher"):
            model.inherit_from_teacher()
        return cls(cfg, model, model, optimizer, _own(stream))

    def batches(self, count: int) -> List[List[dict]]:
        """The first batches of this process."""
        return list(islice(self.stream, count))

    def samples(self, count: int) -> List[dict]:
        """The first training samples of this process."""
        return list(islice((sample for batch in self.stream for sample in batch), count))


def _own(stream: TrainStream) -> TrainStream:
    stream = copy.copy(stream)  # shares the dataset
    stream.num_workers = 0  # a few batches are not worth processes of their own
    return stream
