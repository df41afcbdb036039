"""Time and memory of a training step: the student alone, the teacher, both with the method."""

import itertools
from typing import Any, Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from ..engine import solver
from ..methods.method import over_levels
from .goals import step_goal
from .memory import trace
from .timing import Times, alternate, noise, ratio
from .workload import Workload, build_workload, padded_size

STUDENT, TEACHER, REST, WHOLE = (
    "student step",
    "teacher forward",
    "the method and the rest",  # the difference
    "distillation step",
)


class TrainingStep:
    """One step of Detectron2's training loop on the same batch each time.

    Images to the device, forward, backward, clipping, optimizer and logged losses, as
    `fgd.engine.trainer` runs it, AMP included; without loading data. The learning rate is 0, so
    that every step does the same work.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, batch):
        cfg = cfg.clone()
        cfg.SOLVER.BASE_LR = 0.0
        self.optimizer = solver.build_optimizer(cfg, model)
        loop = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self.trainer = loop(model, itertools.repeat(batch), self.optimizer)
        self.trainer.iter = 0

    def __call__(self) -> None:
        with EventStorage():
            self.trainer.run_step()


def measure(
    cfg: CfgNode,
    size: Tuple[int, int],
    batch: int,
    boxes: int,
    rounds: int,
    threads: int,
    load: Optional[float] = None,
) -> Dict[str, Any]:
    """Time the parts and each variant of the teacher, alternated, then trace their memory.

    Args:
        size: (height, width) of the images in pixels. boxes: per image. load: average before.
    Raises:
        UserError: see `build_workload`.
    """
    torch.set_num_threads(threads)
    work = build_workload(cfg, size, batch, boxes)
    device, padded = work.distiller.device, padded_size(work.student, work.batch)
    node = cfg.MODEL.DISTILLER.TEACHER
    calls = {
        variant: lambda teacher=teacher: teacher.look(work.batch, padded)
        for variant, teacher in work.teachers.items()
    }
    own = node.PRECISION, node.CHANNELS_LAST  # the variant that the distillation step runs
    rows = {
        STUDENT: TrainingStep(cfg, work.student, work.batch),
        **({TEACHER: calls[own]} if calls else {}),
        WHOLE: TrainingStep(cfg, work.distiller, work.batch),
    }
    rows.update({_title(*variant): call for variant, call in calls.items() if variant != own})
    times = alternate(rows, rounds, device)
    over_parts = ratio(
        times[WHOLE].wall, sum(times[x].wall for x in (STUDENT, TEACHER) if x in times)
    )
    of_variants = {v: times[TEACHER if v == own else _title(*v)] for v in calls}
    return {
        "settings": {
            "student": cfg.MODEL.DISTILLER.STUDENT,
            "teacher": (node.CONFIG_FILE or node.TIMM or node.WEIGHTS) if calls else "none",
            "size": size,
            "batch": batch,
            "boxes": boxes,
            "rounds": rounds,
            "threads": threads,
            "device": str(device),
            "amp": cfg.SOLVER.AMP.ENABLED,
        },
        "random_weights": work.random,
        "parts": _parts(rows, times, device),
        "over_parts": over_parts,
        "goals": [step_goal(over_parts).json()],
        "teachers": _teachers(of_variants, term_changes(work)),
        "noise": noise(times, load, threads, on_cpu=device.type == "cpu"),
    }


def _parts(rows: Dict[str, Any], times: Dict[str, Times], device) -> List[Dict[str, Any]]:
    """Figures of the student, the teacher if there is one, the whole, and what it has beyond."""
    whole = times[WHOLE].wall
    known = {name: times[name] for name in (STUDENT, TEACHER) if name in times}
    loss = whole - sum(part.wall for part in known.values())
    parts = []
    for name, part in {
        **known,
        REST: Times(loss, loss),
        WHOLE: times[WHOLE],
    }.items():
        peak = None
        if name != REST:
            for step in (rows[STUDENT], rows[WHOLE]):
                step.optimizer.zero_grad()
            peak = trace(rows[name], device)[1].peak
        share = ratio(part.wall, whole)
        parts.append({"part": name, **part.summary(), "share": share, "peak_bytes": peak})
    return parts


def _teachers(times: Dict[tuple, Times], changes: Dict[tuple, dict]) -> List[Dict[str, Any]]:
    if not times:
        return []
    exact = times["float32", False].wall
    return [
        {
            "precision": variant[0],
            "channels_last": variant[1],
            **times[variant].summary(),
            "over_float32": ratio(times[variant].wall, exact),
            "change": changes[variant],
        }
        for variant in times
    ]


@torch.no_grad()
def term_changes(work: Workload) -> Dict[tuple, Dict[str, Optional[float]]]:
    """By teacher variant: each term of the method over that with the float32 teacher, minus 1.

    None for a term that is 0 with the float32 teacher, and for a teacher with random weights: its
    features hang on rounding as no trained network's do.
    """
    names = [name.removeprefix("loss_") for name in work.distiller.distillation.loss_names]
    if "teacher" in work.random or not work.teachers:
        return {variant: dict.fromkeys(names) for variant in work.teachers}
    with EventStorage():
        _, seen = work.distiller.run_student(work.batch)
    own = work.distiller.teacher

    def terms(teacher) -> Dict[str, float]:
        work.distiller.teacher = teacher
        losses = over_levels(work.distiller.terms(work.distiller.batch(seen, work.batch)))
        return {name: losses[name].item() for name in names}

    values = {variant: terms(teacher) for variant, teacher in work.teachers.items()}
    work.distiller.teacher = own
    exact = values["float32", False]
    return {
        variant: {k: v / exact[k] - 1 if exact[k] else None for k, v in own.items()}
        for variant, own in values.items()
    }


def _title(precision: str, channels_last: bool) -> str:
    return f"teacher {precision}{' channels_last' if channels_last else ''}"


def table(run: Dict[str, Any]) -> str:
    """The run as two Markdown tables, goal and warnings."""
    s = run["settings"]
    heading = (
        f"{s['student']}, teacher {s['teacher']}, {s['size'][0]}x{s['size'][1]}, batch "
        f"{s['batch']}, {s['boxes']} boxes, {s['device']}, {s['threads']} threads, {s['rounds']} "
        f"rounds, AMP {s['amp']}. A step is forward, backward, clipping and optimizer."
    )
    loud = "".join(
        f"\nNOTE: the {who.upper()}'S WEIGHTS ARE RANDOM, not those of the config. Times do not "
        "depend on that."
        for who in run["random_weights"]
    )
    if "teacher" in run["random_weights"]:
        loud += (
            "\nNOTE: how half precision changes the terms is measured with trained teachers "
            "only: give MODEL.DISTILLER.TEACHER.WEIGHTS a local file."
        )
    parts = [
        [
            part["part"],
            _spread(part),
            f"{part['share']:.1%}",
            "" if part["peak_bytes"] is None else f"{part['peak_bytes'] / 2**20:.0f}",
        ]
        for part in run["parts"]
    ]
    teachers = [
        [
            _title(row["precision"], row["channels_last"]),
            _spread(row),
            f"{row['over_float32']:.2f}",
            *("" if x is None else f"{x:+.2%}" for x in row["change"].values()),
        ]
        for row in run["teachers"]
    ]
    median = "ms, median (p10-p90)"
    tables = [(parts, ["part", median, "share of the whole", "peak extra memory, MiB"])]
    if teachers:
        changes = run["teachers"][0]["change"]
        tables.append((teachers, ["teacher forward", median, "x float32", *changes]))
    cells = "\n\n".join(tabulate(r, h, tablefmt="github", disable_numparse=True) for r, h in tables)
    goals = "\n".join(f"goal: {goal['line']}" for goal in run["goals"])
    noisy = "".join(f"\nnoisy: {reason}" for reason in run["noise"])
    return f"{heading}{loud}\n\n{cells}\n\n{goals}{noisy}\n"


def _spread(row: Dict[str, Any]) -> str:
    return f"{row['median_ms']:.1f} ({row['p10_ms']:.1f}-{row['p90_ms']:.1f})"
