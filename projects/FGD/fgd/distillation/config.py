"""Config keys of distillation, MODEL.DISTILLER, and their checks; methods own theirs."""

from typing import FrozenSet, List

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ..config import META_ARCHITECTURE
from ..errors import UserError
from ..methods.batch import Cut
from ..methods.method import METHOD_REGISTRY, chosen_methods
from .lazy_teacher import check_lazy_teacher, is_lazy, lazy_weights
from .levels import parse_level_map
from .schedule import schedule_from_config
from .taps import check_kind
from .timm_teacher import check_timm_teacher
from .unlabeled import unlabeled_terms

PRECISIONS = ("float32", "bfloat16", "float16")  # of the teacher's forward


def add_distiller_config(cfg: CfgNode) -> None:
    """Add MODEL.DISTILLER, in place, with a node for every method there is."""
    node = cfg.MODEL.DISTILLER = type(cfg)()
    # The student's own meta-architecture; MODEL.META_ARCHITECTURE is "Distiller" while training.
    node.STUDENT = "RetinaNet"
    # Name in fgd.METHOD_REGISTRY, or several as "FGD+NKD", whose losses are added; "" = no
    # distillation loss, the student only inherits.
    node.METHOD = "FGD"
    # Names of the distilled outputs of the student's backbone. [] = the method's own choice, for
    # most of them what the student's head reads: p3-p7 for dense detectors, p2-p5 for R-CNN (p6
    # there is only a max-pool of p5).
    node.LEVELS = []
    # Each level learns from the teacher's output of equal stride. Where that is not one output, or
    # not the one wanted: "student_level:teacher_level" strings, for example ["p3:res3"].
    node.LEVEL_MAP = []
    # The tensor of a level, on both sides: "output", which the heads read; "pre_norm", the result
    # of the level's last convolution before the norm of the FPN, which the authors take; "auto" =
    # "pre_norm" if the FPN of student or teacher has group normalisation, else "output", also with
    # layer normalisation (ViTDet, Swin, MViTv2).
    node.FEATURES = "auto"
    # Common factor on all distillation terms, no unit; keeps their ratios.
    node.FACTOR = 1.0
    _add_schedule(node)
    # On images without labels (DATASETS.JSON.UNLABELED_IMAGES): the score from which detections of
    # the teacher count as boxes, for terms that need boxes; 0 = only terms without boxes count.
    node.PSEUDO_BOXES = 0.0
    # What the terms of these images count beside those of labelled ones, no unit.
    node.UNLABELED_WEIGHT = 1.0
    # Draw the method's pictures of a training image in TensorBoard every so many iterations; 0 =
    # off.
    node.PICTURE_PERIOD = 0
    # Copy the teacher's neck and head into the student where names and shapes agree (FGD paper,
    # "inheriting strategy"). Off, because it needs a teacher of the same detector family; a plain
    # R-CNN can take the first stage of a cascade.
    node.INHERIT = False
    _add_teacher(node)
    for name, method in METHOD_REGISTRY:
        node[name.upper()] = type(cfg)()
        method.add_config(node[name.upper()])


def _add_schedule(distiller: CfgNode) -> None:
    node = distiller.SCHEDULE = type(distiller)()
    # FACTOR counts in iterations START <= i < STOP (STOP 0: to the end); elsewhere it is 0 and the
    # teacher does not run. From START it grows linearly, in WARMUP_ITERS iterations.
    node.START = 0
    node.STOP = 0
    node.WARMUP_ITERS = 0
    # "none", or "linear": from the end of the warm-up down to 0 at STOP or SOLVER.MAX_ITER.
    node.DECAY = "none"


def _add_teacher(distiller: CfgNode) -> None:
    node = distiller.TEACHER = type(distiller)()
    # Any Detectron2 yaml: a path, or one of the model zoo's ("COCO-Detection/….yaml"). Or
    # "lazy:<name>", a teacher that Detectron2 has no yaml of, such as
    # "lazy:cascade_mask_rcnn_vitdet_b"; all names are in fgd/distillation/lazy_zoo.py.
    # "" = the config stored in the checkpoint of a teacher that this project trained.
    node.CONFIG_FILE = ""
    # Instead of a detector any network of timm whose features are a map at any size, such as
    # "vit_base_patch16_dinov3.lvd1689m"; the tag decides the normalisation too. It has one level,
    # "tokens", and neither heads nor classes.
    node.TIMM = ""
    # Pixels of the student's images that one of its cells stands for; 0 = a patch. Images are
    # resized to that: 32 shows a network of patches of 16 the images at half their size, for about
    # a quarter of the time.
    node.TIMM_STRIDE = 0
    # Path, URL or detectron2:// address, as MODEL.WEIGHTS takes them. Must load completely. With
    # TIMM that is a file of the network's own names, with or without its classifier, and "" =
    # timm's own pretrained weights, which it downloads. With "lazy:<name>" "" = those that
    # Detectron2's authors publish for it.
    node.WEIGHTS = ""
    # Go on although teacher weights are missing or do not fit. A teacher with random parts
    # teaches noise, so this is for deliberate experiments only.
    node.ALLOW_PARTIAL_WEIGHTS = False
    # What the teacher's forward computes in: "float32", or autocast to "bfloat16" or "float16"
    # (CUDA only). Only this key decides: SOLVER.AMP is the student's and does not reach the
    # teacher. Half precision changes the features that are taught a little; how much each term
    # changes, and what is saved, `python -m fgd.bench step` measures.
    node.PRECISION = "float32"
    # Compute in channels-last memory order: the same features up to rounding, often faster.
    node.CHANNELS_LAST = False


def check_distiller(cfg: CfgNode) -> None:
    """Raise UserError for settings of MODEL.DISTILLER that cannot work; plain configs pass."""
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        return
    node = cfg.MODEL.DISTILLER
    if node.STUDENT == META_ARCHITECTURE or node.STUDENT not in META_ARCH_REGISTRY:
        raise UserError(f"MODEL.DISTILLER.STUDENT: {node.STUDENT!r} is not a student architecture")
    if not node.METHOD and not node.INHERIT:
        raise UserError('MODEL.DISTILLER: with METHOD "" and INHERIT False nothing is distilled')
    methods = chosen_methods(cfg)
    _check_teacher(cfg)
    _check_precision(node.TEACHER.PRECISION, cfg.MODEL.DEVICE)
    parse_level_map(node.LEVEL_MAP)
    check_kind(node.FEATURES)
    schedule_from_config(cfg)
    if node.PICTURE_PERIOD < 0 or node.PICTURE_PERIOD and not methods:
        raise UserError(
            f"MODEL.DISTILLER.PICTURE_PERIOD: {node.PICTURE_PERIOD} must be 0 (no pictures) or, "
            "with a METHOD, a number of iterations"
        )
    for method in methods:
        _check_weights(method, cfg)
        method.check_config(method.node(cfg), cfg)
    unlabeled_terms(cfg)


def asked_for(cfg: CfgNode) -> FrozenSet[str]:
    """What the chosen methods need, of `fgd.methods.method.NEEDS`."""
    return frozenset().union(*(x.needs_of(x.node(cfg)) for x in chosen_methods(cfg)))


def asked_cuts(cfg: CfgNode) -> List[Cut]:
    """Where the chosen methods take maps out of the towers of dense heads."""
    cuts = (cut for x in chosen_methods(cfg) for cut in x.cuts_of(x.node(cfg)).values())
    return list(dict.fromkeys(cuts))


def asked_of_teacher(cfg: CfgNode) -> FrozenSet[str]:
    """The same of the methods that look at a teacher's side too."""
    needs = (x.needs_of(x.node(cfg)) for x in chosen_methods(cfg))
    return frozenset().union(*(x for x in needs if "teacher" in x))


def wants_second_images(cfg: CfgNode) -> bool:
    """Whether training batches need them: a chosen method of a distillation asks for their maps."""
    distilled = cfg.MODEL.META_ARCHITECTURE == META_ARCHITECTURE
    return distilled and "second_view" in asked_for(cfg)


def needs_teacher(cfg: CfgNode) -> bool:
    """Whether inheriting or a chosen method needs one."""
    return cfg.MODEL.DISTILLER.INHERIT or "teacher" in asked_for(cfg)


def teacher_name(cfg: CfgNode) -> str:
    """The teacher's weights for people: the file, or "timm:" and a name; "" if none is named."""
    timm = cfg.MODEL.DISTILLER.TEACHER.TIMM
    return teacher_weights(cfg) or (timm and f"timm:{timm}")


def teacher_weights(cfg: CfgNode) -> str:
    """The teacher's weight file, which "lazy:" alone names too; "" if there is none."""
    node = cfg.MODEL.DISTILLER.TEACHER
    return node.WEIGHTS or lazy_weights(node.CONFIG_FILE)


def _check_teacher(cfg: CfgNode) -> None:
    node = cfg.MODEL.DISTILLER.TEACHER
    if node.TIMM:
        check_timm_teacher(cfg.MODEL.DISTILLER)
    elif node.TIMM_STRIDE:
        raise UserError(
            f"MODEL.DISTILLER.TEACHER.TIMM_STRIDE: {node.TIMM_STRIDE} is of a network of timm, but "
            "TEACHER.TIMM is empty"
        )
    if is_lazy(node.CONFIG_FILE):
        check_lazy_teacher(node.CONFIG_FILE)
    if needs_teacher(cfg) and not teacher_name(cfg):
        raise UserError(
            "MODEL.DISTILLER.TEACHER.WEIGHTS is empty: an untrained teacher teaches noise; name "
            "the teacher's checkpoint"
        )


def _check_weights(method: type, cfg: CfgNode) -> None:
    for key, value in method.node(cfg).items():
        if key.endswith("_WEIGHT") and not 0 <= value < float("inf"):
            name = f"MODEL.DISTILLER.{method.__name__.upper()}.{key}"
            raise UserError(f"{name}: {value} is not a finite weight >= 0")


def _check_precision(precision: str, device: str) -> None:
    key = f"MODEL.DISTILLER.TEACHER.PRECISION: {precision!r}"
    if precision not in PRECISIONS:
        raise UserError(f"{key} is not one of {', '.join(PRECISIONS)}")
    if precision == "float16" and not device.startswith("cuda"):
        raise UserError(f"{key} needs CUDA, but MODEL.DEVICE is {device!r}; use 'bfloat16' there")
