"""A training step without data and downloads: any distillation config on synthetic images."""

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..config import META_ARCHITECTURE, check_config, get_fgd_cfg, student_config
from ..data.checks import NUM_CLASSES_KEYS, config_value
from ..distillation.config import asked_for, needs_teacher
from ..distillation.teacher import FrozenTeacher, build_teacher, untrained_teacher, weights_of
from ..engine.trainer import load_student_weights
from ..errors import UserError
from .cases import draw_batch


class Workload(NamedTuple):
    """Models in training mode on the config's device, and one batch for them.

    Attributes:
        distillers: by MODEL.DISTILLER.METHOD, in the order asked for. student: the same student
            without a distiller. All of them share one set of weights, student's and teacher's.
        teachers: the first distiller's, by precision and channels_last; {} unless asked for.
        random: whose weights are random: "teacher", "student".
        left_out: method that was to be beside the others → why it cannot work here.
    """

    cfg: CfgNode  # of the first distiller
    distillers: Dict[str, nn.Module]
    student: nn.Module
    teachers: Dict[Tuple[str, bool], FrozenTeacher]
    batch: List[dict]
    random: List[str]
    left_out: Dict[str, str]

    @property
    def distiller(self) -> nn.Module:
        """The first."""
        return next(iter(self.distillers.values()))


def build_workload(
    cfg: CfgNode,
    size: Tuple[int, int],
    batch: int,
    boxes: int,
    methods: Sequence[str] = (),
    beside: str = "",
    variants: bool = True,
) -> Workload:
    """The models of a distillation config, under one method after the other.

    Weights that are local files are loaded. All others, which training would download, are random,
    for speed does not depend on them: the statistics of batch norm are then set to those of the
    batch, since features would overflow otherwise.

    Args:
        methods: values of MODEL.DISTILLER.METHOD; none for the config's own. beside: one more, last
            and only if it can work with the pair. variants: whether to build ``teachers``.
    Raises:
        UserError: the config does not distil, needs masks or keypoints, or its files do not load; a
            method cannot work with it.
    """
    methods = list(dict.fromkeys(methods)) or [cfg.MODEL.DISTILLER.METHOD]
    configs = _configs(cfg, methods)
    cfg = configs[methods[0]]
    classes = config_value(cfg, NUM_CLASSES_KEYS[cfg.MODEL.DISTILLER.STUDENT])
    needs = frozenset().union(*map(asked_for, configs.values()))
    inputs = draw_batch(size, batch, boxes, classes, needs)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(inputs, Path(folder))
        distillers = {name: builder.distiller(own) for name, own in configs.items()}
        left_out = {}
        if beside and beside not in distillers:
            try:
                distillers[beside] = builder.distiller(_config_of(cfg, beside, inherit=False))
            except UserError as error:
                left_out[beside] = str(error)
        first = distillers[methods[0]]
        teachers = _teacher_variants(cfg, first.teacher) if variants and first.teacher else {}
    student = builder.student(cfg, first)
    return Workload(cfg, distillers, student, teachers, inputs, builder.random, left_out)


def _configs(cfg: CfgNode, methods: Sequence[str]) -> Dict[str, CfgNode]:
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE or not all(methods):
        raise UserError("the step benchmark needs a distillation config (a METHOD)")
    if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
        raise UserError("the step benchmark draws boxes only: set MODEL.MASK_ON, KEYPOINT_ON False")
    # The first inherits for all: they share its weights.
    inherit = cfg.MODEL.DISTILLER.INHERIT
    return {name: _config_of(cfg, name, inherit and name == methods[0]) for name in methods}


def _config_of(cfg: CfgNode, method: str, inherit: bool) -> CfgNode:
    cfg = cfg.clone()
    cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.INHERIT = method, inherit
    # What is measured is a step that distils.
    cfg.MODEL.DISTILLER.SCHEDULE = get_fgd_cfg().MODEL.DISTILLER.SCHEDULE
    cfg.INPUT.PLAIN_FROM = 0
    cfg.DATASETS.TRAIN_SECOND_IMAGES = "drawn"  # as the first images are: no folder is read
    return cfg


class Builder:
    """Builds distillers, all with the weights of the first one's student and teacher.

    Attributes:
        random: whose weights are random so far.
    """

    def __init__(self, inputs: List[dict], folder: Path):
        """``folder``: for a file with random weights of a teacher."""
        self.inputs, self.folder = inputs, folder
        self.random: List[str] = []
        self._teacher_file = ""
        self._shared: Dict[str, nn.Module] = {}

    def distiller(self, cfg: CfgNode) -> nn.Module:
        """Changes ``cfg`` where the teacher's weights are no local file."""
        node = cfg.MODEL.DISTILLER.TEACHER
        if needs_teacher(cfg) and _is_elsewhere(node.WEIGHTS):
            node.WEIGHTS = self._teacher_file = self._teacher_file or self.random_teacher(cfg)
        check_config(cfg)
        distiller = build_model(cfg).train()
        parts = {"student": distiller.student}
        if distiller.teacher is not None:
            parts.update(distiller.teacher.parts)
        for name, part in parts.items():
            share_weights(part, self._shared.setdefault(name, part))
        return distiller

    def student(self, cfg: CfgNode, distiller: nn.Module) -> nn.Module:
        """A student alone that shares ``distiller``'s weights, after these are filled."""
        student = build_model(student_config(cfg)).train()
        share_weights(student, distiller.student)
        if _is_elsewhere(cfg.MODEL.WEIGHTS):
            with torch.no_grad(), norms_from_data(student.backbone):
                student.backbone(student.preprocess_image(self.inputs).tensor)
            self.random.append("student")
        else:
            load_student_weights(student, cfg.MODEL.WEIGHTS)
        distiller.inherit_from_teacher()
        return student

    def random_teacher(self, cfg: CfgNode) -> str:
        """Path of a new file with random weights of the config's teacher."""
        node = cfg.MODEL.DISTILLER.TEACHER
        if not (node.CONFIG_FILE or node.TIMM):
            raise UserError(
                "MODEL.DISTILLER.TEACHER: give WEIGHTS as a local file, or a CONFIG_FILE to build "
                "a teacher with random weights from"
            )
        model, config = untrained_teacher(cfg)
        teacher = FrozenTeacher(model, config.INPUT.FORMAT, cfg.INPUT.FORMAT)
        with norms_from_data(model.backbone):
            teacher.look(self.inputs, padded_size(model, self.inputs))
        self.random.append("teacher")
        path = self.folder / "random_teacher.pth"
        torch.save({"model": weights_of(model).state_dict()}, path)
        return str(path)


def share_weights(module: nn.Module, owner: nn.Module) -> None:
    """Make parameters and buffers of ``module`` those of ``owner``, a module of the same kind."""
    module.load_state_dict(owner.state_dict(keep_vars=True), assign=True)


def _is_elsewhere(path: str) -> bool:
    return not path or "://" in path


def padded_size(model: nn.Module, inputs: List[dict]) -> Tuple[int, int]:
    """(height, width) of the batch that a detector makes of its inputs."""
    return tuple(model.preprocess_image(inputs).tensor.shape[-2:])


def _teacher_variants(cfg: CfgNode, own: FrozenTeacher) -> Dict[Tuple[str, bool], FrozenTeacher]:
    """The config's teacher in each precision and memory order that the device has."""
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
