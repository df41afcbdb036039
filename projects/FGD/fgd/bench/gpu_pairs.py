"""The pairs of detectors that the GPU run measures: of full size, and small ones for numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from detectron2.config import CfgNode

from ..config import load_config
from ..data.checks import NUM_CLASSES_KEYS, config_value
from .cases import draw_batch
from .workload import Builder

# By pyramid of `cases.PYRAMIDS`: configs of Detectron2's zoo, student and teacher.
ZOO = {
    "retinanet": ("retinanet_R_50_FPN_1x", "retinanet_R_101_FPN_3x"),
    "rcnn": ("faster_rcnn_R_50_FPN_1x", "faster_rcnn_R_101_FPN_3x"),
}
ARCHITECTURES = {"retinanet": "RetinaNet", "rcnn": "GeneralizedRCNN"}
_SMALL: Dict[str, Any] = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [24], [32], [48], [64]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.RETINANET.NUM_CONVS": 2,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 200,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MAX_SIZE_TRAIN": 96,
    # What random numbers a device draws is its own affair: none are drawn.
    "MODEL.DISTILLER.MGD.MASKED_RATIO": 0.0,
    "MODEL.DISTILLER.CROSSKD.REUSED_FROM": 1,
}
_BACKBONES = {
    "retinanet": ("build_retinanet_timm_fpn_backbone", ["res3", "res4", "res5"]),
    "rcnn": ("build_timm_fpn_backbone", ["res2", "res3", "res4", "res5"]),
}


@dataclass(frozen=True)
class Settings:
    """Of a run; ``tiny`` sizes are for a CPU, where it only shows that all of it works."""

    device: str
    threads: int
    tiny: bool

    @property
    def size(self) -> Tuple[int, int]:
        """(height, width) of the images that are timed, in pixels."""
        return (64, 96) if self.tiny else (800, 1333)

    @property
    def padded(self) -> Tuple[int, int]:
        """The same in a batch: both detectors pad to multiples of 32."""
        return tuple(-(-side // 32) * 32 for side in self.size)


def zoo_pair(pyramid: str, device: str, amp: bool) -> CfgNode:
    """A distillation config of full size, R-50 under R-101, with weights that nobody has."""
    student, teacher = (f"COCO-Detection/{name}.yaml" for name in ZOO[pyramid])
    opts = ["MODEL.WEIGHTS", "", "MODEL.DISTILLER.TEACHER.CONFIG_FILE", teacher]
    opts += ["MODEL.DEVICE", device, "SOLVER.AMP.ENABLED", amp]
    return load_config(student, [*opts, *_distils(pyramid)])


def small_pair(pyramid: str, device: str, folder: Path, channels: int = 32) -> CfgNode:
    """A distillation config of tiny detectors for images of 96 pixels.

    The teacher, of random weights that keep features in range, is written to ``folder``.
    """
    name, features = _BACKBONES[pyramid]
    opts = {
        **_SMALL,
        "MODEL.META_ARCHITECTURE": ARCHITECTURES[pyramid],
        "MODEL.DEVICE": device,
        "MODEL.BACKBONE.NAME": name,
        "MODEL.FPN.IN_FEATURES": features,
        "MODEL.FPN.OUT_CHANNELS": channels,
    }
    cfg = load_config("", [x for pair in opts.items() for x in pair])
    path = folder / f"{pyramid}.yaml"
    path.write_text(cfg.dump())
    cfg.merge_from_list(["MODEL.DISTILLER.TEACHER.CONFIG_FILE", str(path), *_distils(pyramid)])
    torch.manual_seed(1)  # not the workload's: student and teacher would be equal
    # Enough cells at every stride that the statistics of its norms hold for other images too.
    builder = Builder(draw_batch((256, 256), 4, 3, 3), folder)
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = builder.random_teacher(cfg)
    return cfg


def small_batch(cfg: CfgNode) -> List[dict]:
    """Two images of 64 x 96 pixels with three boxes each, and a second view."""
    classes = config_value(cfg, NUM_CLASSES_KEYS[cfg.MODEL.DISTILLER.STUDENT])
    return draw_batch((64, 96), 2, 3, classes, frozenset({"second_view"}))


def _distils(pyramid: str) -> List[str]:
    architecture = ARCHITECTURES[pyramid]
    return ["MODEL.META_ARCHITECTURE", "Distiller", "MODEL.DISTILLER.STUDENT", architecture]
