"""A training step without data and downloads: any distillation config on synthetic images."""

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..config import META_ARCHITECTURE, check_config, get_fgd_cfg, student_config
from ..data.checks import NUM_CLASSES_KEYS, config_value
from ..distillation.config import needs_teacher, wants_second_images
from ..distillation.teacher import FrozenTeacher, build_teacher, untrained_teacher, weights_of
from ..engine.trainer import load_student_weights
from ..errors import UserError
from .cases import draw_boxes


class Workload(NamedTuple):
    """Models in training mode on the config's device, and one batch for them."""

    cfg: CfgNode
    distiller: nn.Module
    student: nn.Module  # the same student alone, with weights of its own
    teachers: Dict[Tuple[str, bool], FrozenTeacher]  # by precision, channels_last; {} without one
    batch: List[dict]
    random: List[str]  # whose weights are random: "teacher", "student"


def draw_batch(size: Tuple[int, int], batch: int, boxes: int, classes: int) -> List[dict]:
    """Smooth random images (3, H, W) uint8 with ``boxes`` boxes each, as a mapper gives them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 12, 16, generator=generator)
    images = nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    images = (images * 255).clamp(0, 255).to(torch.uint8)
    inputs = []
    for image, image_boxes in zip(images, draw_boxes(boxes, size, batch), strict=True):
        instances = Instances(size)
        instances.gt_boxes = Boxes(image_boxes)
        instances.gt_classes = torch.randint(classes, (boxes,), generator=generator)
        inputs.append({"image": image, "instances": instances, "height": size[0], "width": size[1]})
    return inputs


def build_workload(cfg: CfgNode, size: Tuple[int, int], batch: int, boxes: int) -> Workload:
    """The models of a distillation config.

    Weights that are local files are loaded. All others, which training would download, are random,
    for speed does not depend on them: the statistics of batch norm are then set to those of the
    batch, since features would overflow otherwise.

    Raises:
        UserError: the config does not distil, needs masks or keypoints, or its files do not load.
    """
    cfg = cfg.clone()
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE or not cfg.MODEL.DISTILLER.METHOD:
        raise UserError("the step benchmark needs a distillation config (a METHOD)")
    if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
        raise UserError("the step benchmark draws boxes only: set MODEL.MASK_ON, KEYPOINT_ON False")
    # What is measured is a step that distils.
    cfg.MODEL.DISTILLER.SCHEDULE = get_fgd_cfg().MODEL.DISTILLER.SCHEDULE
    cfg.INPUT.PLAIN_FROM = 0
    classes = config_value(cfg, NUM_CLASSES_KEYS[cfg.MODEL.DISTILLER.STUDENT])
    inputs = draw_batch(size, batch, boxes, classes)
    if wants_second_images(cfg):
        for sample in inputs:
            sample["second_image"] = sample["image"].flip(-1)
    random = []
    torch.manual_seed(0)
    with _teacher_file(cfg, inputs, random) as path:
        cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = path
        check_config(cfg)
        distiller = build_model(cfg).train()
        teachers = _teacher_variants(cfg, distiller.teacher)
    _fill_student(cfg, distiller, inputs, random)
    student = build_model(student_config(cfg)).train()
    student.load_state_dict(distiller.student.state_dict())
    return Workload(cfg, distiller, student, teachers, inputs, random)


def _is_elsewhere(path: str) -> bool:
    return not path or "://" in path


@contextmanager
def _teacher_file(cfg: CfgNode, inputs: List[dict], random: List[str]):
    """Path of the teacher's weights: the config's, or a temporary file with random ones."""
    node = cfg.MODEL.DISTILLER.TEACHER
    if not _is_elsewhere(node.WEIGHTS) or not needs_teacher(cfg):
        yield node.WEIGHTS
        return
    if not (node.CONFIG_FILE or node.TIMM):
        raise UserError(
            "MODEL.DISTILLER.TEACHER: give WEIGHTS as a local file, or a CONFIG_FILE to build a "
            "teacher with random weights from"
        )
    model, config = untrained_teacher(cfg)
    teacher = FrozenTeacher(model, config.INPUT.FORMAT, cfg.INPUT.FORMAT)
    with norms_from_data(model.backbone):
        teacher.look(inputs, padded_size(model, inputs))
    random.append("teacher")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "random_teacher.pth")
        torch.save({"model": weights_of(model).state_dict()}, path)
        yield path


def _fill_student(cfg: CfgNode, distiller: nn.Module, inputs: List[dict], random: List[str]):
    student, path = distiller.student, cfg.MODEL.WEIGHTS
    if _is_elsewhere(path):
        with torch.no_grad(), norms_from_data(student.backbone):
            student.backbone(student.preprocess_image(inputs).tensor)
        distiller._tap.pop()
        random.append("student")
    else:
        load_student_weights(distiller, path)
    distiller.inherit_from_teacher()


def padded_size(model: nn.Module, inputs: List[dict]) -> Tuple[int, int]:
    """(height, width) of the batch that a detector makes of its inputs."""
    return tuple(model.preprocess_image(inputs).tensor.shape[-2:])


def _teacher_variants(
    cfg: CfgNode, own: Optional[FrozenTeacher]
) -> Dict[Tuple[str, bool], FrozenTeacher]:
    """The config's teacher in each precision and memory order that the device has."""
    if own is None:
        return {}
    keep = [name for name in own.parts if name != "backbone"]
    precisions = ["float32", "bfloat16"]
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        precisions.append("float16")
    variants = {}
    for channels_last in (False, True):
        model, config = build_teacher(cfg)  # the order belongs to the weights: a model for each
        formats = config.INPUT.FORMAT, cfg.INPUT.FORMAT
        for precision in precisions:
            teacher = FrozenTeacher(model, *formats, precision, channels_last, own.sources, keep)
            variants[precision, channels_last] = teacher
    return variants


@contextmanager
def norms_from_data(module: nn.Module):
    """Forward passes inside set the running statistics of batch norm to those of their input.

    A deep network with random weights and without normalisation overflows.
    """

    def measure(norm: nn.Module, args: Tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            norm.running_mean.copy_(args[0].mean(dim=(0, 2, 3)))
            norm.running_var.copy_(args[0].var(dim=(0, 2, 3), correction=0))

    kinds = nn.BatchNorm2d, FrozenBatchNorm2d
    norms = [child for child in module.modules() if isinstance(child, kinds)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
