"""Tiny teachers of the kinds in the table: ViTDet's, Swin's and MViTv2's classes where Detectron2
has them, and a backbone of our own with the same wish for a square, which every Detectron2 builds.
"""

from functools import partial
from typing import Dict, Tuple

import torch
from detectron2 import model_zoo, modeling
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn

from fgd.distillation.lazy_zoo import TEACHERS, Entry
from tests.conftest import make_training_batch

SQUARE, CHANNELS = 128, 16
KEY = "MODEL.DISTILLER.TEACHER.CONFIG_FILE"


class ChannelNorm(nn.Module):
    """Layer normalisation of each cell, as Detectron2's "LN", which v0.6 lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (
            x.var(1, keepdim=True, unbiased=False) + 1e-6
        ).sqrt()


class SquareBackbone(Backbone):
    """p2-p6 that depend on the size of what they are given: on its mean, as attention does."""

    def __init__(self, square: int = SQUARE, channels: int = CHANNELS, levels: str = "23456"):
        super().__init__()
        self.square, self.levels = square, levels
        self.patch = nn.Conv2d(3, channels, 4, 4)
        for k in levels:
            convolutions = [Conv2d(channels, channels, 3, padding=1, norm=ChannelNorm())]
            self.add_module(f"simfp_{k}", nn.Sequential(nn.GELU(), *convolutions))
        self._out_features = [f"p{k}" for k in levels]

    @property
    def padding_constraints(self) -> Dict[str, int]:
        return {"size_divisiblity": 32, "square_size": self.square}  # misspelt as upstream's

    def output_shape(self) -> Dict[str, ShapeSpec]:
        width = self.patch.out_channels
        return {f"p{k}": ShapeSpec(channels=width, stride=2 ** int(k)) for k in self.levels}

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        x, maps = self.patch(images), {}
        x = x + x.mean((2, 3), keepdim=True)
        for k in range(2, 1 + int(self.levels[-1])):
            if str(k) in self.levels:
                maps[f"p{k}"] = self.get_submodule(f"simfp_{k}")(x)
            x = nn.functional.max_pool2d(x, 1, 2)
        return maps


def square_teacher() -> DictConfig:
    """A Faster R-CNN of 3 classes over it, RGB."""
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone = LazyCall(SquareBackbone)()
    model.pixel_mean, model.pixel_std = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
    model.input_format = "RGB"
    return slim(model)


def slim(model: DictConfig) -> DictConfig:
    """Few channels and classes, and no masks."""
    heads = model.roi_heads
    heads.num_classes = 3
    for name in ("mask_in_features", "mask_pooler", "mask_head"):
        heads.pop(name)
    model.proposal_generator.head.in_channels = CHANNELS
    for head in heads.box_heads if "box_heads" in heads else [heads.box_head]:
        head.input_shape = ShapeSpec(channels=CHANNELS, height=7, width=7)
        head.conv_dims, head.fc_dims = [], [32]
    for head in heads.box_predictors if "box_predictors" in heads else [heads.box_predictor]:
        head.input_shape = ShapeSpec(channels=32)
    return model


def _of_table(name: str, **options) -> DictConfig:
    """An entry of the table with a tiny body over a tiny square."""
    model = TEACHERS[name].describe()
    body = model.backbone.net if "net" in model.backbone else model.backbone.bottom_up
    body.update(options)
    model.backbone.out_channels, model.backbone.square_pad = CHANNELS, SQUARE
    return slim(model)


_VIT = {"img_size": SQUARE, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 3}
_VIT["window_block_indexes"] = [0]
_MVIT = {"embed_dim": 8, "depth": 4, "last_block_indexes": [0, 1, 2, 3], "img_size": SQUARE}
_TINY = {
    "square": ("square", {}),
    "vitdet": ("mask_rcnn_vitdet_b", _VIT),
    "cascade_vitdet": ("cascade_mask_rcnn_vitdet_l", _VIT),
    "swin": (
        "cascade_mask_rcnn_swin_b_in21k",
        {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 3},
    ),
    "mvitv2": ("cascade_mask_rcnn_mvitv2_b_in21k", _MVIT),
}


def _has(name: str) -> bool:
    return name == "square" or all(hasattr(modeling, x) for x in TEACHERS[name].needs)


# Those whose classes this Detectron2 has.
TINY: Dict[str, Entry] = {
    kind: Entry((), "", square_teacher if name == "square" else partial(_of_table, name, **options))
    for kind, (name, options) in _TINY.items()
    if _has(name)
}


def randomize(model: nn.Module) -> nn.Module:
    """Without the zeros that relative positions start from."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def trained(kind, path):
    """Two steps of the teacher's own training on random images; into a file."""
    model = randomize(instantiate(TINY[kind].describe())).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(2):
        with EventStorage():
            losses = model(make_training_batch(seed=step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    torch.save({"model": model.state_dict()}, path)


def taught(cfg: CfgNode, kind: str, weights: str = "") -> CfgNode:
    """The config as that of a student under "lazy:<kind>"."""
    cfg.MODEL.DISTILLER.STUDENT = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.merge_from_list([KEY, f"lazy:{kind}", "MODEL.DISTILLER.TEACHER.WEIGHTS", weights])
    return cfg


def sides(batch: list, step: int = 32) -> Tuple[int, int]:
    """To what a student pads a batch."""
    sizes = torch.tensor([x["image"].shape[-2:] for x in batch]).amax(0)
    return tuple(-(-int(size) // step) * step for size in sizes)
