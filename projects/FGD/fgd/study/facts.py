"""Sentences of a study's page: what was compared with what, and how it was tested."""

import math
from typing import List, Mapping, Sequence

import torch
from detectron2 import __version__ as detectron2_version
from detectron2.config import CfgNode

from ..distillation.config import teacher_name
from .arms import LONG, SINGLE, STAGES, STUDENT
from .comparisons import LEVEL
from .labels import NO_LABELS, LabelFile, label_facts
from .run import Run
from .select import select_facts
from .stages import Stage, not_inheriting


def facts(
    args,
    runs: Sequence[Run],
    cfg: CfgNode,
    measured: Mapping[str, dict],
    stages: Sequence[Stage] = (),
    labels: LabelFile = NO_LABELS,
) -> List[str]:
    """What the reader must know of the study.

    Args:
        measured: arm of `TIMED` → its `read_budget`.
    """
    own = label_facts(args.arms.split(","), cfg, labels)
    shared = "" if own else "the data, "
    teacher = args.teacher or teacher_name(cfg) or "none"
    lines = [
        f"{args.config_file}; teacher {teacher}; seeds {args.seeds}"
        + (f"; {' '.join(args.opts)}" if args.opts else "")
        + ".",
        f"All arms have {shared}the schedule ({cfg.SOLVER.MAX_ITER} iterations of "
        f"{cfg.SOLVER.IMS_PER_BATCH} images) and the seeds in common"
        f"{', and the data but for these:' if own else '.'}",
        *own,
    ]
    balanced = dict.fromkeys(run.arm for run in runs if run.balance)
    if balanced:
        lines.append(
            f"MODEL.DISTILLER.FACTOR of {', '.join(balanced)} was measured at the start of each "
            "run (train_net.py --balance)."
        )
    lines += select_facts(runs, cfg)
    lines += time_facts(measured) + stage_facts(args.arms.split(","), stages)
    return [
        *lines,
        f"PyTorch {torch.__version__}, Detectron2 {detectron2_version}, {cfg.MODEL.DEVICE}.",
    ]


def time_facts(measured: Mapping[str, dict]) -> List[str]:
    """Whose time each arm of equal time had, and which methods had less."""
    lines = []
    for arm, budget in measured.items():
        seconds = ", ".join(f"{name} {s:.3f} s" for name, s in budget["seconds"].items())
        spent = budget.get("labelling")
        less = f", less {spent:.0f} s for making the labels" if spent else ""
        lines.append(
            f"{arm}: {budget['iterations']} iterations, {budget['ratio']:.2f} times as many, as "
            f"fit into the time of {budget['arm']}{less} (median per iteration: {seconds}). "
            "Warm-up and steps of the schedule are stretched alike. The teacher's own training is "
            "not in that time."
        )
    times = measured.get(LONG, {"seconds": {}})["seconds"]
    slowest = measured.get(LONG, {}).get("arm")
    others = [name for name in times if name not in (STUDENT, slowest)]
    if others:
        shares = ", ".join(f"{name} {times[name] / times[slowest]:.2f}" for name in others)
        lines.append(
            f"Step time of the other arms over that of {slowest}: {shares}. Below 1 an arm had "
            f"less time than {LONG}."
        )
    return lines


def stage_facts(arms: Sequence[str], stages: Sequence[Stage]) -> List[str]:
    """How arms of several teachers in a row differ from the others."""
    counts, lines = [stage.cfg.SOLVER.MAX_ITER for stage in stages], []
    if STAGES in arms:
        lines.append(
            f"{STAGES}: {' + '.join(map(str, counts))} iterations, each stage from the student of "
            "the one before, with its own schedule and the factor of its config."
        )
        lines += not_inheriting(stages)
    if SINGLE in arms:
        lines.append(
            f"{SINGLE}: {stages[-1].config_file} alone for {sum(counts)} iterations, its schedule "
            "stretched."
        )
    elif STAGES in arms:
        lines.append(
            f"No student was trained for {sum(counts)} iterations with one teacher, so what "
            f"{STAGES} gains may come from the longer training: add the arm {SINGLE}."
        )
    return lines


def how_tested(resamples: int, overall: int, classes: int = 0) -> List[str]:
    """How changes were tested.

    Args:
        overall: how many p values of all classes are corrected for. classes: of single ones, or
            of sizes, at most, in one pair of arms.
    """
    smallest, tests = 2 / (1 + resamples), max(overall, classes)
    lines = [
        f"Paired bootstrap on two levels. Both arms are on the same {resamples} resampled sets of "
        "test images, and the spread of the seeds adds what it adds to a mean of so few (Student's "
        "t); with one seed the test covers images alone. "
        f"p is two-sided, at least {smallest:.3g}. The corrected p is Holm's over the {overall} "
        "comparisons of all classes on this page, boxes and masks together, and for single classes "
        "or sizes over those of the two arms."
    ]
    if tests * smallest > LEVEL:
        enough = math.ceil(2 * tests / LEVEL) - 1
        lines.append(
            f"With {tests} comparisons the corrected p of {resamples} resampled sets is at least "
            f"{min(1.0, tests * smallest):.3g}, so nothing can be told apart: use --resamples "
            f"{enough} or more."
        )
    return lines
