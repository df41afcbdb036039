"""A checkpoint of a distilled run → its distiller, with the teacher that taught; its inputs."""

import os
from typing import Mapping, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from ..checkpoint_entries import FORMAT
from ..config import META_ARCHITECTURE, find_config_file, load_config_text
from ..data.images import ImageMapper
from ..distillation.config import needs_teacher
from ..distillation.distiller import Distiller
from ..distillation.lazy_teacher import check_lazy_teacher, is_lazy
from ..distillation.teacher import describe_teacher
from ..errors import UserError
from ..methods.method import chosen_methods
from ..weights import load_complete, read_weights

_HINT = "say where it is with {}"


def open_run(
    path: str, teacher: str = "", teacher_config: str = "", hint: str = _HINT
) -> Tuple[Distiller, CfgNode]:
    """Student, teacher and loss of a training checkpoint, in eval mode, and the run's config.

    On the run's device, or on the CPU where there is no GPU.

    Args:
        teacher, teacher_config: where these files lie now; "" = where they lay then.
        hint: what to do where they are not; of commands that have not the options of this one.
    Raises:
        UserError: not such a checkpoint, a file is missing, or the teacher is another one.
    """
    data = read_weights(path)
    cfg = load_config_text(data.get("full_config", ""), f"config in {path}")
    if data.get("format") != FORMAT or cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        raise UserError(f"{path} is no checkpoint of a distilled training of this project")
    node = cfg.MODEL.DISTILLER.TEACHER
    node.WEIGHTS = teacher or node.WEIGHTS
    node.CONFIG_FILE = teacher_config or node.CONFIG_FILE
    if needs_teacher(cfg):
        _check_teacher(cfg, data.get("teacher") or {}, hint)
    cfg.MODEL.TIMM.PRETRAINED = False  # all weights are in the checkpoint
    _without_gpu(cfg)
    with torch.random.fork_rng():
        distiller = Distiller(cfg)
    load_complete(distiller.student, path, what="student")
    if distiller.distillation is not None:
        try:
            distiller.distillation.load_state_dict(data["distiller"])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    return distiller.eval(), cfg


def load_inputs(path: str, cfg: CfgNode, record: Optional[dict] = None) -> dict:
    """The network's input at test size; of a record also "instances", as training has them."""
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    mapper = ImageMapper(
        is_train=record is not None, augmentations=[resize], image_format=cfg.INPUT.FORMAT
    )
    return mapper(record or {"file_name": path})


def _check_teacher(cfg: CfgNode, recorded: Mapping[str, str], hint: str) -> None:
    """``recorded``: the checkpoint's "teacher"; {} in those from before it was recorded."""
    node = cfg.MODEL.DISTILLER.TEACHER
    if is_lazy(node.CONFIG_FILE):
        check_lazy_teacher(node.CONFIG_FILE)
    elif node.CONFIG_FILE:
        try:
            find_config_file(node.CONFIG_FILE)
        except UserError as error:
            raise UserError(f"teacher's {error}; {hint.format('--teacher-config')}") from None
    if node.WEIGHTS and "://" not in node.WEIGHTS and not os.path.isfile(node.WEIGHTS):
        raise UserError(f"teacher {node.WEIGHTS} is not there; {hint.format('--teacher')}")
    found = describe_teacher(cfg)
    digest, taught = found["sha256"], recorded.get("sha256", found["sha256"])
    if digest != taught:
        raise UserError(
            f"teacher {found['weights']} (SHA-256 {digest[:12]}…) is not the one that taught this "
            f"student ({taught[:12]}…)"
        )


def _without_gpu(cfg: CfgNode) -> None:
    """Where there is no GPU: what only one can compute gets its equal on the CPU."""
    node = cfg.MODEL.DISTILLER
    if torch.cuda.is_available() or not cfg.MODEL.DEVICE.startswith("cuda"):
        return
    cfg.MODEL.DEVICE = "cpu"
    for method in chosen_methods(cfg):
        method.without_gpu(method.node(cfg))
    if node.TEACHER.PRECISION == "float16":
        node.TEACHER.PRECISION = "float32"
