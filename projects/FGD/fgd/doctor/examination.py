"""Runs the checks: before anything is built those of the config, then those of the model.

The main process checks what is the same for all; the others take part in what the model computes,
because its layers may wait for each other, and learn the verdict.
"""

import logging
import os
from dataclasses import dataclass
from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from ..config import META_ARCHITECTURE, student_config
from ..console import FILE_ONLY
from ..data.checks import NUM_CLASSES_KEYS, class_names, config_value
from ..data.contents import shared_images
from ..data.stream import TrainStream
from ..distillation.config import needs_teacher
from ..distillation.levels import Outputs, plan_levels
from ..engine.checkpoint import student_of
from ..engine.trainer import FGDTrainer
from ..errors import UserError
from ..processes import rng
from ..processes.together import on_every_process
from . import dataset, losses, scoring, teacher, wiring
from .calibration import calibration, check_calibration
from .findings import FAULT, OK, WARNING, Finding, Report
from .patient import Patient
from .settings import NEEDED

REPORT = "doctor.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """How much is looked at."""

    name: str
    images: int  # that the teacher is scored on
    batches: int  # over which losses are averaged

    @classmethod
    def brief(cls, cfg: CfgNode) -> "Form":
        return cls("brief", cfg.DOCTOR.BRIEF_IMAGES, 1)

    @classmethod
    def full(cls, cfg: CfgNode) -> "Form":
        return cls("full", cfg.DOCTOR.IMAGES, cfg.DOCTOR.BATCHES)


def examine(cfg: CfgNode, form: Form, patient: Optional[Patient] = None) -> Report:
    """All checks that make sense for the config; all processes call it together.

    Writes OUTPUT_DIR/doctor.json and logs the report. Model, optimizer and random number
    generators are afterwards as before.

    Args:
        cfg: with registered datasets. patient: None = built here, if the config allows it.
    Raises:
        UserError: there are faults; names them all, in every process.
    """
    report, loaded = Report(), None
    # TorchScript rewrites a function after its first calls, with other rounding: not for us.
    with rng.preserved(), torch.jit.optimized_execution(False):
        stream = (
            patient.stream
            if patient
            else on_every_process(lambda: FGDTrainer.build_train_loader(cfg))
        )
        if comm.is_main_process():
            student = patient.model if patient else None
            report.findings, loaded = _check_config(cfg, stream, student)
        needed = [x for x in report.faults if x.name in NEEDED]
        if not comm.all_gather(bool(needed))[0]:
            _check_model(patient or Patient.build(cfg, stream), loaded, form, report)
    if comm.is_main_process():
        report = report.accepting(cfg.DOCTOR.ACCEPT)
        report.figures = {"form": form.name, **report.figures}
        path = os.path.join(cfg.OUTPUT_DIR, REPORT)
        report.write(path)
        title = f"Doctor ({form.name}), written to {path}:"
        brief = form.name == "brief"
        logger.info(f"{title}\n{report.text()}", extra=FILE_ONLY if brief else None)
        if brief:
            logger.info(f"{title} {report.summary()}")
    complaint = comm.all_gather(report.complaint())[0]
    if complaint:
        raise UserError(f"doctor: {complaint}")
    return report


def _check_config(cfg: CfgNode, stream: TrainStream, student: Optional[nn.Module]) -> tuple:
    """(findings, teacher or None): what needs no trained model. In the main process only.

    Args:
        stream: of the training set. student: None = built here where its shapes are asked for.
    """
    node = student_config(cfg)
    key = NUM_CLASSES_KEYS.get(node.MODEL.META_ARCHITECTURE)
    try:
        names = class_names(cfg)
    except UserError as error:
        return [Finding("classes", FAULT, str(error), "use datasets of the same classes")], None
    if key is None:
        raise UserError(f"doctor: unknown student architecture {node.MODEL.META_ARCHITECTURE!r}")
    findings = [
        _data(cfg, stream, names, "" if student else shared_images(cfg)),  # a training says it
        dataset.check_classes(names, config_value(cfg, key), key),
    ]
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        return findings, None
    if not needs_teacher(cfg):
        return findings, None
    finding, loaded = teacher.check_weights(cfg)
    findings.append(finding)
    if loaded is not None:
        findings.append(teacher.check_formats(cfg, loaded.cfg))
        if cfg.MODEL.DISTILLER.METHOD:
            student = build_model(node) if student is None else student_of(student)
            findings.append(_levels(cfg, student, loaded.model))
        if loaded.is_detector:
            findings.append(_teacher_classes(names, loaded))
    return findings, loaded


def _data(cfg: CfgNode, stream: TrainStream, names: List[str], shared: str) -> Finding:
    sets = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, *cfg.DATASETS.VALID])
    files = {name: MetadataCatalog.get(name).get("coco_file") for name in sets}
    files = {name: file for name, file in files.items() if file is not None}
    return dataset.check_data(stream.dicts, names, files, shared, len(stream.unlabeled))


def _teacher_classes(names: List[str], loaded: teacher.LoadedTeacher) -> Finding:
    key = NUM_CLASSES_KEYS.get(loaded.cfg.MODEL.META_ARCHITECTURE)
    outputs = config_value(loaded.cfg, key) if key else None
    return dataset.check_teacher_classes(names, loaded.report.classes, outputs)


def _levels(cfg: CfgNode, student: nn.Module, teaching: nn.Module) -> Finding:
    """What teaches what, or why nothing can."""
    try:
        plan = plan_levels(cfg, Outputs.of(student.backbone), Outputs.of(teaching.backbone))
    except UserError as error:
        advice = "match them with MODEL.DISTILLER.LEVELS and MODEL.DISTILLER.LEVEL_MAP"
        return Finding("levels", FAULT, str(error), advice)
    rows = [
        f"{x.name} ({x.student_channels} channels) from {x.teacher_name} ({x.teacher_channels}), "
        f"stride {x.stride}"
        for x in dict.fromkeys(level for levels in plan.values() for level in levels)
    ]
    return Finding("levels", OK, "\n".join(rows) or "the method uses none")


def _check_model(
    patient: Patient, loaded: Optional[teacher.LoadedTeacher], form: Form, report: Report
) -> None:
    """Add what the model itself shows. All processes; ``loaded`` and findings: the main one's."""
    model, frozen = patient.model, getattr(patient.model, "teacher", None)
    taught = _gather(frozen.parts) if frozen else None
    method = getattr(model, "distillation", None)
    if loaded is not None and taught is not None:
        original = _gather({name: getattr(loaded.model, name) for name in frozen.parts})
        report.findings.append(wiring.check_frozen(taught, model, patient.wrapped, original))
    report.findings.append(wiring.check_optimizer(model, patient.optimizer, taught, method))
    scored = loaded is not None and loaded.is_detector
    batches = _draw(patient, form, scored=scored)
    if method is not None:
        _check_losses(patient, batches[: form.batches], report)
    if scored:
        samples = [sample for batch in batches for sample in batch]
        samples = [x for x in samples if "instances" in x][: form.images]
        _score(patient, loaded, samples, report)
    elif loaded is not None:
        name = loaded.cfg.MODEL.META_ARCHITECTURE
        found = f"{name} is no detector: it has no classes, and finds no objects to be scored by"
        report.findings.append(Finding("quality", OK, found))


def _gather(parts: Dict[str, nn.Module]) -> nn.Module:
    """One module of several, whose mode is theirs."""
    whole = nn.ModuleDict(parts)
    whole.training = False  # of itself; `eval` would change the parts
    return whole


def _draw(patient: Patient, form: Form, *, scored: bool) -> List[List[dict]]:
    """The first batches: as many as the losses need, or for the teacher's score if that is more."""
    needed = -(-form.images // patient.stream.batch_size) if scored else 0
    return patient.stream.first_batches(max(form.batches, needed))


def _check_losses(patient: Patient, batches: List[List[dict]], report: Report) -> None:
    half = patient.cfg.SOLVER.AMP.ENABLED
    try:
        measured = losses.measure(patient.model, batches, half=half)
    except UserError as error:
        advice = "the grids of student and teacher must agree on every batch"
        report.findings.append(Finding("losses", FAULT, str(error), advice))
        return
    factor = patient.cfg.MODEL.DISTILLER.FACTOR
    report.findings.append(losses.check_losses(measured, factor, len(batches)))
    report.findings.append(losses.check_gradients(measured))
    report.tables.append(losses.loss_table(measured, factor))
    report.figures["losses"] = {
        "detection": measured.detection,
        "distillation_at_factor_1": measured.levels,
        "factor": factor,
        "suggested_factor": losses.suggested_factor(measured),
    }


def _score(
    patient: Patient, loaded: teacher.LoadedTeacher, samples: List[dict], report: Report
) -> None:
    """Add what the whole teacher sees on training images. In the main process only."""
    truth = [sample["instances"] for sample in samples]
    flip = loaded.cfg.INPUT.FORMAT != patient.cfg.INPUT.FORMAT
    given = scoring.detect(loaded.model, samples, flip)
    if given is None:
        report.findings.append(Finding("quality", WARNING, "the teacher detects no boxes"))
        return
    names = class_names(patient.cfg)
    by_class = _teacher_classes(names, loaded).verdict == OK
    swapped = scoring.detect(loaded.model, samples, not flip)
    confidence = [scoring.object_confidence(truth, x, by_class) for x in (given, swapped)]
    report.findings.append(teacher.check_channels(*confidence, loaded.cfg.INPUT.FORMAT))
    score, floor = scoring.ap50(truth, given, by_class), patient.cfg.DOCTOR.MIN_AP50
    report.findings.append(teacher.check_quality(score, floor, len(samples), by_class))
    report.figures["teacher_ap50"] = None if score != score else score
    sure = calibration(truth, given, by_class)
    report.findings.append(check_calibration(sure, len(samples)))
    report.figures["teacher_calibration"] = sure._asdict() if sure.detections else None
