"""Checks of the data: boxes, images, and class names of dataset, student and teacher."""

from typing import Dict, List, Optional, Sequence

from fgd_inputs.coco import CocoFile, count_boxes
from fgd_inputs.names import one_line

from .findings import FAULT, OK, WARNING, Finding


def check_data(
    records: Sequence[dict],
    classes: Sequence[str],
    files: Dict[str, CocoFile],
    shared: str = "",
    unlabeled: int = 0,
) -> Finding:
    """Boxes that are trained on, those that were left out, and what the reader suspects.

    Args:
        records: the training set. classes: names in label order.
        files: name of a set, of training or test → what was read for it.
        shared: of `fgd.data.contents.shared_images`. unlabeled: how many images without labels.
    """
    boxes, crowds = [0] * len(classes), 0
    for annotation in (x for record in records for x in record.get("annotations", ())):
        crowds += annotation.get("iscrowd", 0)
        boxes[annotation["category_id"]] += not annotation.get("iscrowd", 0)
    counted = count_boxes(sum(boxes) + crowds, crowds)
    found = [f"{len(records)} training images, {counted}"]
    found[0] += f", and {unlabeled} images without labels" if unlabeled else ""
    advice = []
    for name, file in files.items():
        found += [f"{name}: {warning}" for warning in file.warnings]
        found += [f"{name}: {file.dropped_text()}"] if file.dropped else []
    if any(file.warnings for file in files.values()):
        advice.append("write boxes as x, y, width, height in pixels")
    if any(file.dropped for file in files.values()):
        advice.append("dropped boxes are listed in data_report.json")
    without = [name for name, count in zip(classes, boxes) if not count]
    if without:
        kind = "no box but crowd regions" if crowds else "no box"
        found.append(f"{kind} of {len(without)} classes ({_shorten(without)})")
        advice.append("check the category ids of the JSON")
    if shared:
        found.append(shared)
        advice.append("test on images that are not trained on")
    verdict = WARNING if len(found) > 1 else OK
    return Finding("data", verdict, "; ".join(found), "; ".join(advice))


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
    return ", ".join(map(one_line, names[:most])) + (", ..." if len(names) > most else "")
