"""How many times a step of the student an arm's step takes, whatever else the machine is doing.

Both are alternated in one process, and on a CPU their processor time counts: clocks of runs of
different hours tell how busy the machine was.
"""

import itertools
import math
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from fgd_inputs.json_file import number, read_json

from .. import compat
from ..config import load_config
from ..data.datasets import register_from_config
from ..engine.step import build_step
from ..engine.trainer import FGDTrainer
from ..errors import UserError
from ..processes.alone import run_alone
from ..timing import alternate, ratio
from .files import write_json

FILE = "step-times.json"
ROUNDS = 15


class StepTime(NamedTuple):
    """Of one arm, beside the student.

    Attributes:
        ratio: median of the ratios within each round.
        student: seconds of its step, median: processor time on a CPU, the clock on a GPU.
        clock: the same by the clock.
    """

    ratio: float
    student: float
    clock: float


class Steps:
    """Training steps of a run: loading, forward, backward, optimizer; nothing is learned.

    The learning rate is 0, so that each step of an arm works on the same weights, those at the
    start of a run. Images are loaded in this process, so that its time has them.
    """

    def __init__(self, cfg: CfgNode):
        cfg = register_from_config(cfg, ("TRAIN",))
        cfg.defrost()
        cfg.SOLVER.BASE_LR = 0.0
        if cfg.MODEL.DEVICE == "cpu":
            cfg.DATALOADER.NUM_WORKERS = 0
        self.device = torch.device(cfg.MODEL.DEVICE)
        model = FGDTrainer.build_model(cfg)
        stream = FGDTrainer.build_train_loader(cfg)
        compat.unwrap(model).seed = stream.seed  # what a method draws follows from it
        self.step = build_step(cfg, model, stream, FGDTrainer.build_optimizer(cfg, model))
        self.count = itertools.count()

    def __call__(self) -> None:
        self.step.iter = next(self.count)
        with EventStorage(self.step.iter):
            self.step.run_step()


def time_beside(student: Sequence[str], arm: Sequence[str], rounds: int, threads: int) -> StepTime:
    """Time the steps of two runs, alternated; both draw the same images.

    Args:
        student, arm: the config file, then KEY VALUE pairs. threads: of PyTorch.
    Raises:
        UserError: a config, the data or the teacher cannot be used.
    """
    torch.set_num_threads(threads)
    rows = {"student": Steps(load_config(student[0], student[1:]))}
    rows["arm"] = Steps(load_config(arm[0], arm[1:]))
    device = rows["student"].device
    # As in a training with a seed: TorchScript would otherwise compile in the timed rounds.
    with torch.jit.optimized_execution(False):
        times = alternate(rows, rounds, device)
    own, alone = (
        x.cpu if device.type == "cpu" else x.wall for x in (times["arm"], times["student"])
    )
    clock = times["student"].wall
    return StepTime(ratio(own, alone), float(np.median(alone)), float(np.median(clock)))


def measure(
    output: Path, words: Mapping[str, List[str]], student: str, arms: Sequence[str], threads: int
) -> Dict[str, StepTime]:
    """The times of these arms, measured where ``output``/`FILE` has none, and kept there.

    Kept, because all seeds must have one schedule, those that are added another day too.

    Args:
        words: arm → its config file and options. student: the arm that is the student alone.
    Raises:
        UserError: the file is not one of a study; or see `time_beside`.
    """
    path = output / FILE
    found = read_times(path) if path.exists() else {}
    for arm in [arm for arm in arms if arm not in found]:
        print(f"timing {ROUNDS} steps of {arm} beside those of {student}", flush=True)
        found[arm] = run_alone(time_beside, words[student], words[arm], ROUNDS, threads)
        write_json(path, {name: time._asdict() for name, time in found.items()})
    return {arm: found[arm] for arm in arms}


def read_times(path: Path) -> Dict[str, StepTime]:
    content = read_json(str(path), "step times")
    try:
        times = {arm: StepTime(**entry) for arm, entry in content.items()}
        values = [number(value) for time in times.values() for value in time]
        if not all(value is not None and 0 < value < math.inf for value in values):
            raise ValueError("a time is no number above 0")
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{path}: not what a study writes; delete it to measure the times again"
        ) from None
    return times
