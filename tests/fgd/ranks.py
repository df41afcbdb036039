"""What the processes of test_launch.py run; new processes import it by name."""

import os
import signal
from pathlib import Path

import torch
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

from fgd.errors import DivergedError
from fgd.trainer import FGDTrainer

from .training import training_cfg


class Poison(HookBase):
    """Makes the loss of the third iteration NaN, on rank 1 only."""

    def before_step(self):
        if self.trainer.iter == 2 and comm.get_rank() == 1:
            module = self.trainer.model.module
            forward = module.forward
            module.forward = lambda batch: {k: v * torch.nan for k, v in forward(batch).items()}


def train(folder: str) -> int:
    """Two good steps, one that diverges; leaves rank{r}.pth."""
    cfg = training_cfg(Path(folder), opts=("SOLVER.CHECKPOINT_PERIOD", 2))
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([Poison()])
    initial = {k: v.clone() for k, v in trainer.model.module.state_dict().items()}
    try:
        trainer.train()
        message = "no error"
    except DivergedError as error:
        message = str(error)
    result = {
        "model": dict(trainer.model.named_parameters()),
        "initial": initial,
        "message": message,
        "iteration": trainer.iter,
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        "threads": torch.get_num_threads(),
    }
    torch.save(result, Path(folder) / f"rank{comm.get_rank()}.pth")
    return 0


def die_on_rank_1() -> int:
    """Rank 1 is killed, as by the kernel when memory is short, while rank 0 waits for it."""
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()
    return 0
