"""The teacher: built from its own config and weights, frozen, and never part of the student."""

from contextlib import contextmanager
from functools import partial
from typing import Collection, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import checkpoint_config, load_config, load_config_text
from ..errors import UserError
from ..methods.batch import Cut, HeadLevel, RegionView
from ..trained_with import other_config
from ..weights import LoadReport, load_complete, read_weights, state_sha256, weights_sha256
from .config import needs_teacher, teacher_name, teacher_weights
from .lazy_teacher import build_lazy_teacher, is_lazy, lazy_text
from .padding import Padding, cut, strides
from .regions import view_of
from .taps import Sources, after_norms, read_levels
from .timm_teacher import TimmNetwork, build_timm_teacher
from .towers import LevelRun, OnDemand


class LoadedTeacher(NamedTuple):
    """The whole teacher, whether a detector or not; a `FrozenTeacher` keeps what is needed."""

    model: nn.Module
    cfg: CfgNode
    report: LoadReport

    @property
    def is_detector(self) -> bool:
        return not isinstance(self.model, TimmNetwork)


def untrained_teacher(cfg: CfgNode) -> Tuple[nn.Module, CfgNode]:
    """The whole teacher with random weights, and its config; UserError as `teacher_config`."""
    node = cfg.MODEL.DISTILLER.TEACHER
    if node.TIMM:
        return build_timm_teacher(cfg)
    if is_lazy(node.CONFIG_FILE):
        return build_lazy_teacher(node.CONFIG_FILE, cfg.MODEL.DEVICE)
    config = teacher_config(cfg)
    return build_model(config), config


def weights_of(model: nn.Module) -> nn.Module:
    """The module of a teacher whose state dict its weight file is."""
    return model.network if isinstance(model, TimmNetwork) else model


def load_teacher(cfg: CfgNode) -> LoadedTeacher:
    """The whole teacher with its weights.

    Raises:
        UserError: weights are missing, do not fit or are not finite, unless
            MODEL.DISTILLER.TEACHER.ALLOW_PARTIAL_WEIGHTS says otherwise; or they were trained on
            other images than CONFIG_FILE makes.
    """
    path, allow_partial = teacher_weights(cfg), cfg.MODEL.DISTILLER.TEACHER.ALLOW_PARTIAL_WEIGHTS
    model, config = untrained_teacher(cfg)
    load = model.load_weights if isinstance(model, TimmNetwork) else partial(load_complete, model)
    report = load(path, allow_partial=allow_partial)
    if not isinstance(model, TimmNetwork):
        other_config(path, report.config, config)
    return LoadedTeacher(model, config, report)


def describe_teacher(cfg: CfgNode) -> Dict[str, str]:
    """Which weights teach: {"weights": file or name, "sha256": of the file, or of the tensors}.

    Without a file they are timm's, which are read once more for it.

    Raises:
        UserError: they cannot be had.
    """
    path = teacher_weights(cfg)
    if path or not cfg.MODEL.DISTILLER.TEACHER.TIMM:
        return {"weights": path, "sha256": weights_sha256(path)}
    with torch.random.fork_rng():
        digest = state_sha256(weights_of(load_teacher(cfg).model))
    return {"weights": teacher_name(cfg), "sha256": digest}


def teacher_config(cfg: CfgNode) -> CfgNode:
    """A detector's own config, on the student's device.

    From MODEL.DISTILLER.TEACHER.CONFIG_FILE or, when that is empty, from the teacher's checkpoint.

    Raises:
        UserError: neither has one, or the file is not yaml.
    """
    node = cfg.MODEL.DISTILLER.TEACHER
    if is_lazy(node.CONFIG_FILE):
        key = "MODEL.DISTILLER.TEACHER.CONFIG_FILE"
        raise UserError(f"{key} {node.CONFIG_FILE}: this command needs a yaml file of the teacher")
    if node.CONFIG_FILE:
        teacher = load_config(node.CONFIG_FILE)
    else:
        text = read_weights(node.WEIGHTS).get("config")
        if not isinstance(text, str):
            raise UserError(
                f"teacher {node.WEIGHTS}: holds no config; set MODEL.DISTILLER.TEACHER.CONFIG_FILE"
            )
        teacher = load_config_text(text, f"config in {node.WEIGHTS}")
    teacher = checkpoint_config(teacher)  # a teacher may itself have been distilled
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    return teacher


def config_text(cfg: CfgNode) -> str:
    """All that MODEL.DISTILLER.TEACHER.CONFIG_FILE says; "" if it is empty.

    Raises:
        UserError: it cannot be read.
    """
    file = cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE
    if is_lazy(file):
        return lazy_text(file)
    return load_config(file).dump() if file else ""


def build_teacher(cfg: CfgNode) -> Tuple[Optional[nn.Module], Optional[CfgNode]]:
    """The whole teacher with its weights, and its config; (None, None) without one.

    Raises:
        UserError: as `load_teacher`.
    """
    return load_teacher(cfg)[:2] if needs_teacher(cfg) else (None, None)


class TeacherView(NamedTuple):
    """What the teacher makes of a batch."""

    maps: Dict[str, Tensor]  # of the distilled levels, by the student's name
    outputs: Dict[str, Tensor]  # of its backbone, by its own


class FrozenTeacher:
    """A backbone and neck in eval mode, without gradients; heads if they are needed.

    Deliberately not an nn.Module: as a plain attribute of the distiller it is in no state_dict,
    optimizer, DDP bucket or checkpoint, and ``.train()`` does not reach it.

    Args:
        model: the whole teacher, a detector or a `TimmNetwork`; only ``backbone``, ``pixel_mean``
            and ``pixel_std`` are kept, and what ``keep`` names.
        input_format: channel order that it expects, "BGR" or "RGB".
        batch_format: channel order of the images that it will be given, the student's.
        precision: "float32", or "bfloat16" or "float16" for autocast. Normalising stays float32.
        channels_last: compute in that memory order.
        sources: what `look` takes, by the student's level; None = all outputs.
        keep: names of further submodules, "roi_heads" or "head"; all that is kept is in ``parts``.
        detects: keep it whole, for `detect`.
    """

    def __init__(
        self,
        model: nn.Module,
        input_format: str,
        batch_format: str,
        precision: str = "float32",
        channels_last: bool = False,
        sources: Optional[Sources] = None,
        keep: Sequence[str] = (),
        detects: bool = False,
    ):
        if sorted(input_format) != sorted(batch_format):
            raise UserError(
                f"teacher INPUT.FORMAT {input_format!r} cannot be made from the student's "
                f"{batch_format!r}"
            )
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.parts = {name: getattr(model, name) for name in ("backbone", *keep)}
        for part in self.parts.values():
            part.eval().requires_grad_(False)
        self._detector = model.eval().requires_grad_(False) if detects else None
        self.backbone = self.parts["backbone"].to(memory_format=self.layout)
        self.autocast_dtype = None if precision == "float32" else getattr(torch, precision)
        self.pixel_mean, self.pixel_std = model.pixel_mean, model.pixel_std
        self.flip_channels = input_format != batch_format
        self.sources = sources
        self.head_levels = list(getattr(model, "head_in_features", ()))

    @contextmanager
    def _computing(self):
        """No gradient, and its precision, whatever autocast is around."""
        kind, dtype = self.pixel_mean.device.type, self.autocast_dtype
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            yield

    @torch.no_grad()
    def look(
        self,
        batched_inputs: List[dict],
        padded_size: Tuple[int, int],
        *,
        as_heads_read: bool = False,
    ) -> "TeacherView":
        """The teacher's maps of the student's augmented batch, with its own normalisation.

        Images are padded with zeros after normalising, as Detectron2 does, to the student's
        padded (height, width), so that both pyramids lie on the same grid. A teacher that wants a
        square gets its square, and its maps are cut to that grid; its outputs are not, as its RoI
        heads read them whole.

        The maps have the dtype that the precision gives, and are contiguous whatever the layout
        inside: what reads them beside the student's need not know it. An autocast around the call,
        such as the trainer's, has no effect.

        Args:
            as_heads_read: the maps after the norms of the pyramid, whatever ``sources`` say.
        Raises:
            UserError: the batch is larger than the square.
        """
        sources = after_norms(self.sources) if as_heads_read else self.sources
        own_size = Padding.of(self.backbone).teaching(padded_size)
        images = torch.stack([self._normalize(x["image"], own_size) for x in batched_inputs])
        with self._computing():
            images = images.contiguous(memory_format=self.layout)
            maps, outputs = read_levels(self.backbone, images, sources)
        if own_size != tuple(padded_size):
            steps = strides(self.backbone, sources)
            maps = {k: cut(x, own_size, padded_size, steps.get(k, 0)) for k, x in maps.items()}
        return TeacherView({name: x.contiguous() for name, x in maps.items()}, outputs)

    def detect(self, batched_inputs: List[dict], score: float) -> List[Instances]:
        """What it finds in each image alone, from a score on, as ground truth in its pixels.

        The images as `look` takes them; they go through its backbone once more.
        """
        images = [x["image"].flip(0) if self.flip_channels else x["image"] for x in batched_inputs]
        with self._computing():
            results = [self._detector([{"image": x}])[0]["instances"] for x in images]
        found = (x[x.scores >= score] for x in results)
        return [
            Instances(
                x.image_size, gt_boxes=Boxes(x.pred_boxes.tensor.float()), gt_classes=x.pred_classes
            )
            for x in found
        ]

    def regions(self, outputs: Mapping[str, Tensor], boxes: List[Boxes]) -> RegionView:
        """What its RoI heads say of boxes in pixels of the batch that ``outputs`` are of."""
        with self._computing():
            return view_of(self.parts["roi_heads"], outputs, boxes)

    def head_maps(self, outputs: Mapping[str, Tensor]) -> List[Tensor]:
        """What of its backbone's outputs its dense head reads, finest first."""
        return [outputs[name] for name in self.head_levels]

    def head(self, maps: List[Tensor], cuts: Collection[Cut] = ()) -> Mapping[int, HeadLevel]:
        """What its dense head makes of maps, by level; computed where and when it is asked for."""
        head, mode = self.parts["head"], self._computing
        levels = range(len(maps))
        return OnDemand(levels, lambda k: LevelRun(head, k, 0, (maps[k],) * 2, mode, cuts))

    def _normalize(self, image: Tensor, padded_size: Tuple[int, int]) -> Tensor:
        image = image.to(self.pixel_mean.device)
        image = (
            (image.flip(0) if self.flip_channels else image) - self.pixel_mean
        ) / self.pixel_std
        bottom, right = (full - size for full, size in zip(padded_size, image.shape[-2:]))
        return F.pad(image, (0, right, 0, bottom))
