"""Checks of the teacher: its weights, its quality on labelled images, what it expects to see."""

import statistics
from typing import List, Optional, Sequence, Tuple

from detectron2.config import CfgNode

from ..distillation.teacher import LoadedTeacher, describe_teacher, load_teacher
from ..errors import UserError
from .findings import FAULT, OK, WARNING, Finding

# Swapped channels must do so much better: mean confidence in an object, and that in standard errors
# over images. Real teachers gained at most 0.016 where the order did not matter; one for which it
# did lost 0.29 or more with the wrong one, 4.2 standard errors, on any 8 images.
SWAP_GAIN, SWAP_ERRORS = 0.03, 3.0
_FEW = 4  # images: fewer say nothing about the order of channels


def check_weights(cfg: CfgNode) -> Tuple[Finding, Optional[LoadedTeacher]]:
    """Whether the teacher's weights load completely; the teacher if they do."""
    try:
        teacher = load_teacher(cfg)
        known = describe_teacher(cfg)
    except UserError as error:
        advice = "an untrained teacher teaches noise: name the weights that belong to its config"
        return Finding("weights", FAULT, str(error), advice), None
    teacher.model.eval().requires_grad_(False)
    found = f"{known['weights']}: {teacher.report.summary()}; SHA-256 {known['sha256']}"
    if teacher.report.missing or teacher.report.mismatched:
        advice = "allowed by MODEL.DISTILLER.TEACHER.ALLOW_PARTIAL_WEIGHTS; those parts are random"
        return Finding("weights", WARNING, found, advice), teacher
    return Finding("weights", OK, found), teacher


def check_quality(score: float, floor: float, images: int, by_class: bool) -> Finding:
    """Whether the teacher finds the labelled objects of the training images.

    Args:
        score: its AP50 in percent; NaN if the images have no objects. floor: DOCTOR.MIN_AP50.
        by_class: whether the class had to be right.
    """
    if score != score:
        return Finding("quality", WARNING, f"{images} images without a labelled box: not scored")
    kind = "AP50" if by_class else "AP50 whatever the class"
    least = f"floor {floor:g}" if floor else "no floor"
    found = f"{kind} {score:.1f} of the teacher on {images} training images, {least}"
    if score >= floor:
        return Finding("quality", OK, found)
    advice = (
        "an untrained teacher, or one for other images: check MODEL.DISTILLER.TEACHER.WEIGHTS, and "
        "INPUT (sizes, format) against what it was trained with. DOCTOR.MIN_AP50 sets the floor"
    )
    return Finding("quality", FAULT, found, advice)


def check_formats(student: CfgNode, teacher: CfgNode) -> Finding:
    """Channel order, mean and deviation that both configs state."""
    found, suspicious = [], []
    for who, cfg in (("student", student), ("teacher", teacher)):
        mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
        found.append(f"{who} {cfg.INPUT.FORMAT}, mean {mean}, deviation {std}")
        if _other_order(cfg.INPUT.FORMAT, mean):
            suspicious.append(who)
    if sorted(student.INPUT.FORMAT) != sorted(teacher.INPUT.FORMAT):
        advice = "the teacher's images cannot be made from the student's; use BGR or RGB in both"
        return Finding("formats", FAULT, "; ".join(found), advice)
    if suspicious:
        advice = f"MODEL.PIXEL_MEAN of the {' and the '.join(suspicious)} is in the other order"
        return Finding("formats", WARNING, "; ".join(found), advice)
    return Finding("formats", OK, "; ".join(found))


def _other_order(format: str, mean: Sequence[float]) -> bool:
    """Photographs, ImageNet's above all, are redder than blue: so are true means."""
    if len(mean) != 3 or sorted(format) != ["B", "G", "R"]:
        return False
    red, blue = mean[format.index("R")], mean[format.index("B")]
    return blue - red > 5


def check_channels(given: List[float], swapped: List[float], teacher_format: str) -> Finding:
    """Whether the teacher would see more with red and blue exchanged: then its format is wrong.

    Args:
        given: per image with objects, its mean confidence in them, see `object_confidence`, with
            channels in ``teacher_format``, its INPUT.FORMAT. swapped: the same, order reversed.
    """
    name = "channels"
    if len(given) < _FEW:
        return Finding(name, OK, f"only {len(given)} images with objects: not compared")
    gains = [b - a for a, b in zip(given, swapped)]
    gain = statistics.mean(gains)
    error = statistics.stdev(gains) / len(gains) ** 0.5
    found = (
        f"the teacher's mean confidence in {len(given)} images' objects is "
        f"{statistics.mean(given):.3f} in {teacher_format}, "
        f"{statistics.mean(swapped):.3f} with red and blue swapped"
    )
    if gain < SWAP_GAIN or gain < SWAP_ERRORS * error:
        return Finding(name, OK, found)
    advice = (
        f"its weights were trained with {teacher_format[::-1]}: set INPUT.FORMAT "
        f"{teacher_format[::-1]} in the teacher's config (MODEL.DISTILLER.TEACHER.CONFIG_FILE)"
    )
    return Finding(name, FAULT, found, advice)
