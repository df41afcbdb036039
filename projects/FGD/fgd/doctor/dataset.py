"""Checks of the data: boxes that were dropped, and class names of dataset, student and teacher."""

import json
import os
from collections import Counter
from typing import Dict, List, Optional, Sequence

from .findings import FAULT, OK, WARNING, Finding


def dropped_boxes(folder: str, datasets: Sequence[str]) -> Dict[str, Dict[str, int]]:
    """Dataset → {reason: number of boxes} from ``folder``/data_report.json; {} without one."""
    path = os.path.join(folder, "data_report.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    return {
        name: dict(Counter(entry["reason"] for entry in report[name]["dropped"]))
        for name in datasets
        if name in report
    }


def check_data(
    images: int, boxes: Sequence[int], dropped: Dict[str, Dict[str, int]], classes: Sequence[str]
) -> Finding:
    """Boxes that can be trained on, and those that were left out, with the reasons.

    Args:
        images: number of training images. boxes: of each class. dropped: see `dropped_boxes`.
    """
    found = f"{images} training images, {sum(boxes)} boxes"
    problems, advice = [], []
    for name, reasons in dropped.items():
        text = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        problems.append(f"{sum(reasons.values())} boxes of {name} dropped ({text})")
    if dropped:
        advice.append("they are listed in data_report.json")
    without = [name for name, count in zip(classes, boxes) if not count]
    if without:
        problems.append(f"no box of {len(without)} classes ({_shorten(without)})")
        advice.append("check the category ids of the JSON")
    verdict = WARNING if problems else OK
    return Finding("data", verdict, "; ".join([found, *problems]), "; ".join(advice))


def check_classes(dataset: List[str], student_outputs: int, key: str) -> Finding:
    """One output of the student for each class of the dataset.

    Args:
        dataset: class names in label order. student_outputs: of ``key``, its config key.
    """
    if len(dataset) == student_outputs:
        return Finding("classes", OK, f"{_counted(dataset)} in dataset and student")
    found = f"the dataset has {_counted(dataset)}, the student's {key} is {student_outputs}"
    return Finding("classes", FAULT, found, f"set {key} {len(dataset)}")


def check_teacher_classes(
    dataset: List[str], teacher: List[str], teacher_outputs: Optional[int]
) -> Finding:
    """The teacher knows the dataset's classes, in the same order.

    Args:
        teacher: its class names, [] if its checkpoint does not say. teacher_outputs: how many it
            distinguishes, None if its config does not say.
    """
    name = "teacher_classes"
    if not teacher and teacher_outputs is None:
        return Finding(name, WARNING, "neither names nor number of the teacher's classes are known")
    problem = _difference(dataset, teacher, teacher_outputs)
    if not problem:
        known = "the same in the teacher" if teacher else "as many in the teacher, names unknown"
        return Finding(name, OK, f"{_counted(dataset)}; {known}")
    advice = (
        "use a teacher trained on these classes in this order; if its features are worth learning "
        "all the same, accept it with DOCTOR.ACCEPT \"['teacher_classes']\""
    )
    return Finding(name, FAULT, problem, advice)


def _difference(dataset: List[str], teacher: List[str], teacher_outputs: Optional[int]) -> str:
    """How the teacher's classes differ; "" if they do not, as far as is known."""
    ours, theirs = ([name.strip().lower() for name in names] for names in (dataset, teacher))
    if teacher_outputs is not None and teacher and teacher_outputs != len(teacher):
        return f"the teacher has {teacher_outputs} outputs for {_counted(teacher)}"
    if not teacher:
        if teacher_outputs == len(dataset):
            return ""
        return f"the teacher has {teacher_outputs} classes, the dataset {_counted(dataset)}"
    if ours == theirs:
        return ""
    lists = f"teacher {_counted(teacher)}, dataset {_counted(dataset)}"
    missing = [name for name in dataset if name.strip().lower() not in theirs]
    extra = [name for name in teacher if name.strip().lower() not in ours]
    if not missing and not extra:
        return f"the same classes in another order: {lists}"
    parts = []
    if missing:
        parts.append(f"the teacher does not know {_shorten(missing)}")
    if extra:
        parts.append(f"it knows {_shorten(extra)}, which the dataset lacks")
    return f"{' and '.join(parts)}: {lists}"


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({_shorten(names)})"


def _shorten(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
