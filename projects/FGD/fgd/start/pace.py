"""How long steps take here, by the clock, and how many of them a budget buys."""

import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple

import torch

from ..config import check_config, load_config, student_config
from ..data.checks import check_class_count
from ..data.datasets import register_from_config
from ..data.settings import check_images, check_sets
from ..errors import UserError
from ..study.step_times import Steps
from ..timing import alternate
from .recipe import DISTIL, STUDENT, TEACHER

STEPS = 5  # timed, after one that is not
# Of the budget: the teacher's half; the other one is of the student alone and the distilled one,
# which have the same number of steps.
TEACHERS = 0.5
LEAST = 10  # iterations: with fewer, not even the learning rate has risen
FEW = 100
# Over these a set of images is learnt by heart before the budget is spent.
EPOCHS, TEACHERS_EPOCHS = 100, 200


class Pace(NamedTuple):
    """Seconds of a step: of the student alone, of the teacher, of the distilled student."""

    student: float
    teacher: float
    distil: float

    def in_words(self, device: str) -> str:
        where, threads = device, torch.get_num_threads()
        if device == "cpu":
            where += f", {threads} thread" + "s" * (threads > 1)
        return (
            f"a step takes {self.student:.3g} s of the student, {self.distil:.3g} s of the "
            f"distilled one, {self.teacher:.3g} s of the teacher ({where})"
        )


class Schedule(NamedTuple):
    """Iterations of both students and of the teacher, and the minutes that all three take."""

    student: int
    teacher: int
    minutes: float
    capped: bool  # by the number of epochs

    def in_words(self, budget: float) -> str:
        text = (
            f"of {budget:g} minutes the teacher gets half, {self.teacher} iterations, and student "
            f"and distilled student the other half, {self.student} each; evaluations come on top"
        )
        if self.capped:
            text += (
                f"; {self.minutes:.3g} minutes are used: no more than {EPOCHS} rounds through the "
                f"images, of the teacher {TEACHERS_EPOCHS}"
            )
        if self.student < FEW:
            text += f"; {self.student} are few to learn from: give a larger --budget"
        return text


def schedule(pace: Pace, minutes: float, batch: int, images: int) -> Schedule:
    """What a budget buys; UserError if that is next to nothing."""
    pair, seconds = pace.student + pace.distil, 60 * minutes
    bought = int(seconds * (1 - TEACHERS) / pair), int(seconds * TEACHERS / pace.teacher)
    if min(bought) < LEAST:
        needed = LEAST * max(pair / (1 - TEACHERS), pace.teacher / TEACHERS) / 60
        raise UserError(
            f"--budget {minutes:g}: too short for {LEAST} iterations each; give {needed:.2g} "
            "minutes or more"
        )
    most = [max(LEAST, -(-x * images // batch)) for x in (EPOCHS, TEACHERS_EPOCHS)]
    student, teacher = (min(pair) for pair in zip(bought, most))
    spent = (student * pair + teacher * pace.teacher) / 60
    return Schedule(student, teacher, spent, (student, teacher) != bought)


def measure(folder: Path, data: Dict[str, str]) -> Pace:
    """Time steps of the configs in a folder, alternated; each is checked as a run would be.

    Nothing is learned. The distilled one has a teacher of random weights, which takes as long.

    Args:
        data: DATASETS.JSON keys that hold as long as the files lie there.
    Raises:
        UserError: a config cannot work with the data or with the others.
    """
    opts = [word for key, value in data.items() for word in (f"DATASETS.JSON.{key}", value)]
    with tempfile.TemporaryDirectory() as scratch:
        opts += ["OUTPUT_DIR", scratch, "SEED", "0"]
        rows = {"student": _steps(folder / STUDENT, opts)}
        rows["teacher"] = _steps(folder / TEACHER, opts)
        rows["teacher"]()  # so that averages of norms are of these images
        weights, config = Path(scratch, "teacher.pth"), load_config(str(folder / TEACHER), opts)
        state = rows["teacher"].step.model.state_dict()
        torch.save({"model": state, "config": student_config(config).dump()}, weights)
        opts += ["MODEL.DISTILLER.TEACHER.WEIGHTS", str(weights)]
        rows["distil"] = _steps(folder / DISTIL, opts)
        times = alternate(rows, STEPS, rows["student"].device)
    return Pace(**{name: float(sorted(own.wall)[STEPS // 2]) for name, own in times.items()})


def _steps(path: Path, opts: List[str]) -> Steps:
    """Of a config that is checked as a run would check it."""
    cfg = load_config(str(path), opts)
    check_images(cfg)
    check_config(cfg)
    check_sets(cfg, training=True)
    check_class_count(register_from_config(cfg))
    return Steps(cfg)
