"""Every config key of the project, and the only ways in which its commands read configs."""

import os
from contextlib import contextmanager
from typing import Sequence

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from .data.datasets import add_data_config
from .detectors.backbones import add_timm_config
from .detectors.fcos import add_fcos_config
from .detectors.reppoints import add_reppoints_config
from .distillation.features import parse_level_map
from .distillation.methods import METHOD_REGISTRY, terms_function
from .distillation.schedule import schedule_from_config
from .distillation.taps import check_kind
from .doctor.settings import add_doctor_config, check_doctor
from .engine.solver import add_solver_config
from .errors import UserError
from .yaml_config import SafeCfgNode, parse_yaml

META_ARCHITECTURE = "Distiller"
PRECISIONS = ("float32", "bfloat16", "float16")  # of the teacher's forward


def add_fgd_config(cfg: CfgNode) -> None:
    """Add the project's keys, all off by default, to a Detectron2 config, in place."""
    add_timm_config(cfg)
    add_fcos_config(cfg)
    add_reppoints_config(cfg)
    add_data_config(cfg)
    add_solver_config(cfg)
    add_doctor_config(cfg)
    cfg.MODEL.DISTILLER = _distiller_node(type(cfg))


def _distiller_node(Node) -> CfgNode:
    distiller = Node()
    # The student's own meta-architecture; MODEL.META_ARCHITECTURE is "Distiller" while training.
    distiller.STUDENT = "RetinaNet"
    # Name in fgd.METHOD_REGISTRY; "" = no distillation loss, the student only inherits.
    distiller.METHOD = "FGD"
    # Names of the distilled outputs of the student's backbone. [] = the paper's choice for its
    # detector: p3-p7 for dense detectors, p2-p5 for R-CNN (p6 there is only a max-pool of p5).
    distiller.LEVELS = []
    # Each level learns from the teacher's output of equal stride. Where that is not one output, or
    # not the one wanted: "student_level:teacher_level" strings, for example ["p3:res3"].
    distiller.LEVEL_MAP = []
    # The tensor of a level, on both sides: "output", which the heads read; "pre_norm", the result
    # of the level's last convolution before the norm of the FPN, which the authors take; "auto" =
    # "pre_norm" if the FPN of student or teacher has group normalisation, else "output".
    distiller.FEATURES = "auto"
    # Common factor on all distillation terms, no unit; keeps their ratios.
    distiller.FACTOR = 1.0
    distiller.SCHEDULE = Node()
    # FACTOR counts in iterations START <= i < STOP (STOP 0: to the end); elsewhere it is 0 and the
    # teacher does not run. From START it grows linearly, in WARMUP_ITERS iterations.
    distiller.SCHEDULE.START = 0
    distiller.SCHEDULE.STOP = 0
    distiller.SCHEDULE.WARMUP_ITERS = 0
    # "none", or "linear": from the end of the warm-up down to 0 at STOP or SOLVER.MAX_ITER.
    distiller.SCHEDULE.DECAY = "none"
    # Draw masks and attention of a training image in TensorBoard every so many iterations; 0 = off.
    distiller.PICTURE_PERIOD = 0
    # Copy the teacher's neck and head into the student where names and shapes agree (paper,
    # "inheriting strategy"). Off, because it needs a teacher of the same detector family.
    distiller.INHERIT = False

    distiller.TEACHER = Node()
    # Any Detectron2 yaml: a path, or one of the model zoo's ("COCO-Detection/….yaml").
    # "" = the config stored in the checkpoint of a teacher that this project trained.
    distiller.TEACHER.CONFIG_FILE = ""
    # Path, URL or detectron2:// address, as MODEL.WEIGHTS takes them. Must load completely.
    distiller.TEACHER.WEIGHTS = ""
    # Go on although teacher weights are missing or do not fit. A teacher with random parts
    # teaches noise, so this is for deliberate experiments only.
    distiller.TEACHER.ALLOW_PARTIAL_WEIGHTS = False
    # What the teacher's forward computes in: "float32", or autocast to "bfloat16" or "float16"
    # (CUDA only). Only this key decides: SOLVER.AMP is the student's and does not reach the
    # teacher. Half precision changes the features that are taught a little; how much each FGD
    # term changes, and what is saved, `python -m fgd.bench step` measures.
    distiller.TEACHER.PRECISION = "float32"
    # Compute in channels-last memory order: the same features up to rounding, often faster.
    distiller.TEACHER.CHANNELS_LAST = False

    distiller.FGD = Node()
    # The four weights of one level's terms, no unit. Sums over cells and channels divided by the
    # images per GPU, so they belong to the input size: RetinaNet's at 1333x800 are the default.
    distiller.FGD.FOREGROUND_WEIGHT = 1e-3  # alpha
    distiller.FGD.BACKGROUND_WEIGHT = 5e-4  # beta
    distiller.FGD.ATTENTION_WEIGHT = 5e-4  # gamma; authors' class default 1e-3, their configs 5e-4
    distiller.FGD.RELATION_WEIGHT = 5e-6  # lambda
    # Softmax temperature of the attention maps; the authors use 0.8 for FCOS.
    distiller.FGD.TEMPERATURE = 0.5
    # Pixels that a feature map spans: "padded" = the padded batch, geometrically right;
    # "image" = each image's own size, the authors' scaling, which stretches masks under padding.
    distiller.FGD.MASK_REFERENCE = "padded"
    # What computes the terms, with equal results: "torch"; "triton", kernels for NVIDIA GPUs that
    # have not run on one yet, hence not the default; "composed", the slow definition.
    distiller.FGD.IMPLEMENTATION = "torch"
    return distiller


def get_fgd_cfg() -> CfgNode:
    """Detectron2's defaults plus this project's keys; its files are read without executing code."""
    cfg = SafeCfgNode(get_cfg())
    add_fgd_config(cfg)
    return cfg


def find_config_file(path: str) -> str:
    """The local path itself or the model zoo's file of that name; UserError if there is none."""
    if os.path.isfile(path) or "://" in path:
        return path
    try:
        return model_zoo.get_config_file(path)
    except RuntimeError:
        raise UserError(
            f"config {path!r}: no such file, and Detectron2's model zoo has none of that name"
        ) from None


def load_config(path: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file (if any), then ``KEY VALUE`` pairs. Not frozen.

    Raises:
        UserError: missing file, unknown key, wrong type, code in the file; names file and key.
    """
    cfg = get_fgd_cfg()
    if path:
        with _config_errors(path):
            cfg.merge_from_file(find_config_file(path), allow_unsafe=False)
    with _config_errors("command line"):
        cfg.merge_from_list(list(opts))
    return cfg


@contextmanager
def _config_errors(source: str):
    """Detectron2 and yacs report a bad config through assorted exceptions: make them one."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, ValueError, AssertionError, OSError) as error:
        raise UserError(f"{source}: {error.args[-1] if error.args else error}") from error


def load_config_text(text: str, source: str) -> CfgNode:
    """A config that is stored as text, e.g. in a checkpoint; errors as in `load_config`."""
    cfg = get_fgd_cfg()
    with _config_errors(source):
        cfg.merge_from_other_cfg(SafeCfgNode(parse_yaml(text, source)))
    return cfg


def student_config(cfg: CfgNode) -> CfgNode:
    """A clone that builds the student alone: its meta-architecture, and no distiller node."""
    student = cfg.clone()
    student.defrost()
    if student.MODEL.META_ARCHITECTURE == META_ARCHITECTURE:
        student.MODEL.META_ARCHITECTURE = student.MODEL.DISTILLER.STUDENT
    student.MODEL.pop("DISTILLER", None)
    return student


def check_config(cfg: CfgNode) -> None:
    """Refuse distillation settings that cannot work, before anything is built.

    Raises:
        UserError: names the key, what was found and what is allowed.
    """
    check_doctor(cfg)
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        return
    node = cfg.MODEL.DISTILLER
    if node.STUDENT == META_ARCHITECTURE or node.STUDENT not in META_ARCH_REGISTRY:
        raise UserError(f"MODEL.DISTILLER.STUDENT: {node.STUDENT!r} is not a student architecture")
    if not node.METHOD and not node.INHERIT:
        raise UserError('MODEL.DISTILLER: with METHOD "" and INHERIT False nothing is distilled')
    if node.METHOD and node.METHOD not in METHOD_REGISTRY:
        known = ", ".join(name for name, _ in METHOD_REGISTRY)
        raise UserError(f"MODEL.DISTILLER.METHOD: {node.METHOD!r} is unknown; there is {known}")
    if not node.TEACHER.WEIGHTS:
        raise UserError(
            "MODEL.DISTILLER.TEACHER.WEIGHTS is empty: an untrained teacher teaches noise; name "
            "the teacher's checkpoint"
        )
    _check_precision(node.TEACHER.PRECISION, cfg.MODEL.DEVICE)
    parse_level_map(node.LEVEL_MAP)
    check_kind(node.FEATURES)
    schedule_from_config(cfg)
    if node.PICTURE_PERIOD < 0 or node.PICTURE_PERIOD and node.METHOD != "FGD":
        raise UserError(
            f"MODEL.DISTILLER.PICTURE_PERIOD: {node.PICTURE_PERIOD} must be 0 (no pictures) or, "
            "with METHOD FGD, a number of iterations"
        )
    if node.FGD.MASK_REFERENCE not in ("padded", "image"):
        raise UserError(
            f"MODEL.DISTILLER.FGD.MASK_REFERENCE: {node.FGD.MASK_REFERENCE!r} is neither "
            "'padded' nor 'image'"
        )
    if not node.FGD.TEMPERATURE > 0:
        raise UserError(f"MODEL.DISTILLER.FGD.TEMPERATURE: {node.FGD.TEMPERATURE} is not above 0")
    terms_function(node.FGD.IMPLEMENTATION)
    if node.FGD.IMPLEMENTATION == "triton" and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError(
            "MODEL.DISTILLER.FGD.IMPLEMENTATION triton needs MODEL.DEVICE cuda, found "
            f"{cfg.MODEL.DEVICE}"
        )
    for key, value in node.FGD.items():
        if key.endswith("_WEIGHT") and not 0 <= value < float("inf"):
            raise UserError(f"MODEL.DISTILLER.FGD.{key}: {value} is not a finite weight >= 0")


def _check_precision(precision: str, device: str) -> None:
    key = f"MODEL.DISTILLER.TEACHER.PRECISION: {precision!r}"
    if precision not in PRECISIONS:
        raise UserError(f"{key} is not one of {', '.join(PRECISIONS)}")
    if precision == "float16" and not device.startswith("cuda"):
        raise UserError(f"{key} needs CUDA, but MODEL.DEVICE is {device!r}; use 'bfloat16' there")
