"""FPN over any timm backbone that offers features, for students smaller than ResNet-18."""

import logging
from typing import Dict, Optional, Sequence

import timm
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import nn

from ..errors import UserError, in_one_line
from .pretrained import (
    Normalisation,
    check_pretrained,
    load_pretrained,
    timm_normalisation,
)
from .pyramids import group_norm, pyramid, top_block

__all__ = [
    "TimmBackbone",
    "add_timm_config",
    "build_retinanet_timm_fpn_backbone",
    "build_timm_fpn_backbone",
    "check_timm",
    "check_timm_name",
    "create_timm",
    "refuse_freezing",
    "stage_strides",
    "timm_fpn",
    "warn_of_other_images",
]

logger = logging.getLogger(__name__)

_STAGES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}  # Detectron2's names and their strides
_NORMS = ("BN", "SyncBN", "FrozenBN", "GN")


def add_timm_config(cfg: CfgNode) -> None:
    """Add MODEL.TIMM, read by the builders below and of `vit`; MODEL.FPN.* is as in Detectron2."""
    node = cfg.MODEL.TIMM = type(cfg)()
    # Any name for which timm.create_model(name, features_only=True) gives strides 4, 8, 16, 32.
    node.NAME = "mobilenetv3_small_050"
    # ImageNet weights. False: from scratch. True: timm downloads its own. A file: timm's names, or
    # those that torchvision and Detectron2 give ResNets. "package:efficientnet_lite0" (lite1,
    # lite2): of a package that extra [pretrained] installs, for MODEL.TIMM.NAME
    # tf_efficientnet_lite0. All expect RGB and their own MODEL.PIXEL_MEAN / _STD; others are warned
    # of. A checkpoint holds all weights, so what is built for one fetches none.
    node.PRETRAINED = False
    # "BN", "SyncBN" (several GPUs with few images each), "FrozenBN" (only with PRETRAINED) or "GN"
    # (from scratch with few images per batch, above all when images differ in kind: batch norm's
    # averages then fit none of them). MODEL.FPN.NORM is the pyramid's own.
    node.NORM = "BN"
    # Levels above the last of MODEL.FPN.IN_FEATURES: "maxpool" (p6), "p6p7" (two convolutions),
    # "none" (small images need neither), "default" = maxpool, or p6p7 in the RetinaNet builder.
    node.TOP_BLOCK = "default"


def check_timm(cfg: CfgNode) -> None:
    """Raise UserError for values of MODEL.TIMM that cannot work in a training.

    A backbone whose weights come from a checkpoint is built with PRETRAINED False.
    """
    node = cfg.MODEL.TIMM
    check_pretrained(node.PRETRAINED, node.NAME)
    if node.NORM == "FrozenBN" and not node.PRETRAINED:
        raise UserError(
            "MODEL.TIMM.NORM FrozenBN needs MODEL.TIMM.PRETRAINED, since frozen statistics of "
            "random weights mean nothing"
        )


class TimmBackbone(Backbone):
    """A timm features-only network under Detectron2's backbone contract.

    images (N, C, H, W), H and W multiples of the largest stride -> dict of `out_features`, each
    (N, channels, H / stride, W / stride). Where timm offers several features of one stride, the
    last one counts; stages above the last one asked for are not built.
    """

    def __init__(self, name: str, out_features, in_channels=3, pretrained=False, norm="BN"):
        """
        Args:
            out_features: ascending subset of res2, res3, res4, res5 (strides 4, 8, 16, 32).
            pretrained: as MODEL.TIMM.PRETRAINED; ``expected`` is then the images' normalisation.
            norm: BN, SyncBN, FrozenBN or GN.
        Raises:
            UserError: unknown timm name or stage, no feature of a stride, failed download, or a
                file of weights that does not fit.
        """
        super().__init__()
        strides = stage_strides(out_features)
        _check_norm(norm, pretrained)
        indices = _stage_indices(name, out_features)
        self.expected = None
        body = create_timm(name, pretrained is True, in_chans=in_channels, out_indices=indices)
        _drop_unread_stages(body)
        if isinstance(pretrained, str):
            report, self.expected = load_pretrained(body, name, pretrained)
            logger.info(f"MODEL.TIMM.PRETRAINED {pretrained}: {report.summary()}")
        elif pretrained:
            self.expected = timm_normalisation("MODEL.TIMM.NAME", name)
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")) == "NHWC"
        channels = body.feature_info.channels()
        # timm's own converters: Detectron2's would drop the activation inside BatchNormAct2d.
        if norm == "SyncBN":
            body = convert_sync_batchnorm(body)
        elif norm == "FrozenBN":
            body = freeze_batch_norm_2d(body)
        elif norm == "GN":
            _to_group_norms(body)
        self.body = body
        self._out_features = list(out_features)
        self._out_feature_channels = dict(zip(out_features, channels, strict=True))
        self._out_feature_strides = strides

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def forward(self, x):
        features = self.body(x)
        if self._channels_last:
            features = [f.permute(0, 3, 1, 2).contiguous() for f in features]
        return dict(zip(self._out_features, features, strict=True))


def _drop_unread_stages(body: nn.Module) -> None:
    """What timm does itself in all but these two: they would run, and train nothing."""
    if isinstance(body, (EfficientNetFeatures, MobileNetV3Features)):
        last = max(info["stage"] for info in body.feature_info.get_dicts())
        body.blocks = body.blocks[:last]


def stage_strides(names: Sequence[str]) -> Dict[str, int]:
    """Stride of each of MODEL.FPN.IN_FEATURES; UserError unless they are an ascending subset."""
    if any(x not in _STAGES for x in names) or list(names) != sorted(set(names)) or not names:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES {list(names)}: expected an ascending subset of {list(_STAGES)}"
        )
    return {x: _STAGES[x] for x in names}


def _check_norm(norm: str, pretrained: bool) -> None:
    if norm not in _NORMS:
        raise UserError(f"MODEL.TIMM.NORM {norm!r}: expected one of {', '.join(_NORMS)}")
    if norm == "GN" and pretrained:
        raise UserError(
            "MODEL.TIMM.NORM GN needs MODEL.TIMM.PRETRAINED False: the weights were trained with "
            "batch norms"
        )


def _to_group_norms(module: nn.Module) -> None:
    """Replace every batch norm inside, in place; scales and shifts keep their first values.

    Activation and dropout of timm's BatchNormAct2d follow the new norm.
    """
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            _to_group_norms(child)
            continue
        norm = group_norm(child.num_features)
        norm.load_state_dict({"weight": child.weight, "bias": child.bias})
        rest = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
        setattr(module, name, nn.Sequential(norm, *rest) if rest else norm)


def create_timm(name: str, pretrained: bool, **options) -> nn.Module:
    """timm.create_model, whose failures (no network, no such name) become one-line errors."""
    check_timm_name("MODEL.TIMM.NAME", name)
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except Exception as error:  # timm and its hub client raise about ten unrelated types here
        if pretrained:
            raise UserError(
                f"pretrained weights of {name!r} could not be loaded ({in_one_line(error)}). "
                "Without network set MODEL.TIMM.PRETRAINED False, or fill timm's cache (HF_HOME) "
                "first"
            ) from error
        raise UserError(f"MODEL.TIMM.NAME {name!r}: {in_one_line(error)}") from error


def check_timm_name(key: str, name: str) -> None:
    """Raise UserError unless timm has a network of that name, whatever its tag."""
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8]) or "none"
        raise UserError(f"{key} {name!r} is not a timm model (similar: {similar})")


def _stage_indices(name: str, out_features) -> tuple[int, ...]:
    """Index of the last timm feature of each stage's stride, from an untrained probe."""
    reductions = create_timm(name, pretrained=False).feature_info.reduction()
    missing = [f for f in out_features if _STAGES[f] not in reductions]
    if missing:
        raise UserError(
            f"MODEL.TIMM.NAME {name!r} has features of strides {reductions}, none for "
            f"{', '.join(f'{f} (stride {_STAGES[f]})' for f in missing)} of MODEL.FPN.IN_FEATURES"
        )
    last = {reduction: index for index, reduction in enumerate(reductions)}
    return tuple(last[_STAGES[f]] for f in out_features)


def refuse_freezing(cfg: CfgNode) -> None:
    """Raise UserError if MODEL.BACKBONE.FREEZE_AT asks for it."""
    if cfg.MODEL.BACKBONE.FREEZE_AT != 0:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}: timm backbones have no "
            "common notion of a stem to freeze, set it to 0"
        )


def warn_of_other_images(cfg: CfgNode, expected: Optional[Normalisation]) -> None:
    """Weights learnt on images of another kind start worse, and nothing else would show it."""
    if expected is None:
        return
    wanted = {
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, "RGB"),
        "MODEL.PIXEL_MEAN": (list(cfg.MODEL.PIXEL_MEAN), expected.mean),
        "MODEL.PIXEL_STD": (list(cfg.MODEL.PIXEL_STD), expected.std),
    }
    differ = [f"{key} {want}" for key, (found, want) in wanted.items() if not _near(found, want)]
    if differ:
        logger.warning(
            f"MODEL.TIMM.PRETRAINED {cfg.MODEL.TIMM.PRETRAINED}: the weights expect "
            f"{', '.join(differ)}; the config has others"
        )


def _near(one, other) -> bool:
    """Within one grey value, since 127 and 127.5 are both in use for the same weights."""
    if isinstance(one, str):
        return one == other
    return len(one) == len(other) and all(abs(a - b) <= 1 for a, b in zip(one, other, strict=True))


def timm_fpn(
    cfg: CfgNode, input_shape: ShapeSpec, default_top_block: str, p6p7=LastLevelP6P7
) -> FPN:
    """FPN over MODEL.TIMM.

    Args:
        default_top_block: what MODEL.TIMM.TOP_BLOCK "default" means.
        p6p7: makes the top block of that name, with the signature of Detectron2's.
    Raises:
        UserError: a key of MODEL.TIMM, MODEL.FPN or MODEL.BACKBONE that does not fit; names it.
    """
    timm_cfg, fpn_cfg = cfg.MODEL.TIMM, cfg.MODEL.FPN
    refuse_freezing(cfg)
    bottom_up = TimmBackbone(
        timm_cfg.NAME, fpn_cfg.IN_FEATURES, input_shape.channels, timm_cfg.PRETRAINED, timm_cfg.NORM
    )
    warn_of_other_images(cfg, bottom_up.expected)
    last = fpn_cfg.IN_FEATURES[-1]
    channels = bottom_up.output_shape()[last].channels
    return pyramid(cfg, bottom_up, top_block(cfg, default_top_block, last, channels, p6p7))


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN for R-CNN: p2-p5 from MODEL.FPN.IN_FEATURES, and p6 by max-pooling."""
    return timm_fpn(cfg, input_shape, "maxpool")


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN for dense detectors: p3-p5 from MODEL.FPN.IN_FEATURES, and p6, p7 by convolutions."""
    return timm_fpn(cfg, input_shape, "p6p7")
