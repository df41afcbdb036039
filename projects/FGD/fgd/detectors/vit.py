"""Vision transformers of timm as backbones: ViTDet's simple feature pyramid, over one square.

Plain ViT Backbones for Object Detection (arXiv 2203.16527): every level is made of the last map
alone, by transposed convolutions or pooling and two normalised convolutions. Detectron2's main
branch has that as `SimpleFeaturePyramid`, v0.6 does not; module names here are the same.

Unlike there, every block looks at the whole image, as timm's do (ViTDet: windows in most), and the
class token stays. Attention reads the padding, so features depend on the canvas: images are padded
to one square always, in training, in inference and in graphs.
"""

import re
from typing import Dict, Iterator, NamedTuple, Optional

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..errors import UserError
from .backbones import (
    create_timm,
    refuse_freezing,
    stage_strides,
    warn_of_other_images,
)
from .pretrained import load_pretrained, timm_normalisation
from .pyramids import pyramid_norm, top_block

__all__ = [
    "SimplePyramid",
    "VisionTransformer",
    "add_vit_config",
    "build_retinanet_vit_fpn_backbone",
    "build_vit_fpn_backbone",
    "check_vit",
    "has_vit",
]

KEY = "MODEL.VIT.SQUARE"
BUILDERS = ("build_vit_fpn_backbone", "build_retinanet_vit_fpn_backbone")
TOKENS = "tokens"
_PATCH = 16  # pixels; the levels' strides are 1/4, 1/2, 1 and 2 of it


def add_vit_config(cfg: CfgNode) -> None:
    """Add MODEL.VIT, in place.

    Both builders also read MODEL.TIMM.NAME (timm's vit_* and deit_* with patches of 16 pixels),
    .PRETRAINED and .TOP_BLOCK, MODEL.FPN.IN_FEATURES (res2 to res5 stand for p2 to p5),
    .OUT_CHANNELS and .NORM, of which ViTDet's is "LN".
    """
    node = cfg.MODEL.VIT = type(cfg)()
    # Side in pixels to which every image is padded, a multiple of the coarsest level's stride. No
    # image may be larger. Embeddings of positions are interpolated to it from pretrained weights.
    node.SQUARE = 1024


def has_vit(cfg: CfgNode) -> bool:
    """Whether the student is built by one of `BUILDERS`."""
    return cfg.MODEL.BACKBONE.NAME in BUILDERS


def check_vit(cfg: CfgNode) -> None:
    """Raise UserError for settings that do not go with a vision transformer."""
    if not has_vit(cfg):
        return
    if cfg.MODEL.TIMM.NORM != "BN":
        raise UserError(
            f"MODEL.TIMM.NORM {cfg.MODEL.TIMM.NORM}: {cfg.MODEL.BACKBONE.NAME} has no batch norms "
            "to replace; leave it BN. The pyramid's norm is MODEL.FPN.NORM"
        )
    square, sizes = cfg.MODEL.VIT.SQUARE, cfg.INPUT
    longest = {
        "INPUT.MAX_SIZE_TRAIN": sizes.MAX_SIZE_TRAIN if any(sizes.MIN_SIZE_TRAIN) else 0,
        "INPUT.MAX_SIZE_TEST": sizes.MAX_SIZE_TEST if sizes.MIN_SIZE_TEST else 0,
        "TEST.AUG.MAX_SIZE": cfg.TEST.AUG.MAX_SIZE if cfg.TEST.AUG.ENABLED else 0,
    }
    for key, side in longest.items():
        if side > square:
            raise UserError(
                f"{key} {side}: images are padded to a square of {square} pixels ({KEY}), and such "
                f"a one does not fit into it; set it to {square} or less"
            )


class Layer(NamedTuple):
    """One parameter of a vision transformer, and how deep it is."""

    parameter: nn.Parameter
    depth: int  # 0: embeddings; i + 1: block i, counted from 0
    is_position: bool


class VisionTransformer(Backbone):
    """timm's network without its last norm and classifier, as ViTDet has it.

    images (N, C, S, S) → {"tokens": (N, D, S / 16, S / 16)}, the patches' tokens after all blocks.

    Args:
        name: in timm. square: S. pretrained: as MODEL.TIMM.PRETRAINED; ``expected`` is then the
            images' normalisation.
    Raises:
        UserError: timm has no such vision transformer, a failed download, or a file of weights that
            does not fit.
    """

    def __init__(self, name: str, square: int, in_channels=3, pretrained=False):
        super().__init__()
        self.square_size, self.expected = square, None
        body = _create(name, square, in_channels, pretrained is True)
        if isinstance(pretrained, str):
            _, self.expected = load_pretrained(body.model, name, pretrained)
        elif pretrained:
            self.expected = timm_normalisation("MODEL.TIMM.NAME", name)
        self.body = body
        self.blocks = len(body.model.blocks)
        self._out_features = [TOKENS]
        self._out_feature_channels = {TOKENS: body.feature_info.channels()[-1]}
        self._out_feature_strides = {TOKENS: _PATCH}

    @property
    def size_divisibility(self) -> int:
        return self.square_size

    def layers(self) -> Iterator[Layer]:
        """Of all parameters."""
        for name, parameter in self.body.model.named_parameters():
            block = re.match(r"blocks\.(\d+)\.", name)
            yield Layer(parameter, int(block[1]) + 1 if block else 0, name == "pos_embed")

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        height, width = images.shape[-2:]
        if (height, width) != (self.square_size, self.square_size):
            raise UserError(
                f"{KEY} {self.square_size}: an image is larger than that square, so the batch was "
                f"padded to {height}x{width} pixels; set INPUT.MAX_SIZE_TRAIN (for test images "
                f"INPUT.MAX_SIZE_TEST), with MIN_SIZE of it above 0, to {self.square_size} or less"
            )
        return {TOKENS: self.body(images)[-1]}


def _create(name: str, square: int, in_channels: int, pretrained: bool) -> nn.Module:
    """timm's network for one size of images, which gives its last map alone.

    A size that may vary would be resampled inside of an exported graph.
    """
    sizes = {"img_size": square, "dynamic_img_size": False}
    try:
        body = create_timm(name, pretrained, in_chans=in_channels, out_indices=1, **sizes)
    except UserError as error:
        if "img_size" not in str(error):
            raise
        body = None  # networks of other kinds have no such options
    network = getattr(body, "model", None)
    if not (hasattr(network, "blocks") and body.feature_info.reduction() == [_PATCH]):
        raise UserError(
            f"MODEL.TIMM.NAME {name!r} is no vision transformer of patches of {_PATCH} pixels, as "
            f"{' and '.join(BUILDERS)} need; take one of timm's vit_*_patch{_PATCH}_* or "
            f"deit_*_patch{_PATCH}_*"
        )
    return body


class SimplePyramid(Backbone):
    """images (N, C, S, S) → {"p2": (N, `out_channels`, S / 4, S / 4), ...}.

    Args:
        levels: the stride of each, 4 to 32. norm: as MODEL.FPN.NORM, after every convolution but
            those of `top_block`. top_block: as Detectron2's FPN takes it; it reads the last level.
    """

    def __init__(
        self,
        bottom_up: VisionTransformer,
        levels: Dict[str, int],
        out_channels: int,
        norm: str,
        top_block: Optional[nn.Module] = None,
    ):
        super().__init__()
        self.bottom_up, self.square_size = bottom_up, bottom_up.square_size
        self._levels, strides = [f"simfp_{level[1:]}" for level in levels], dict(levels)
        for name, stride in zip(self._levels, levels.values()):
            self.add_module(name, _level(bottom_up, stride, out_channels, norm))
        self.top_block, last = top_block, int(list(levels)[-1][1:])
        for above in range(1, 1 + getattr(top_block, "num_levels", 0)):
            strides[f"p{last + above}"] = 2**above * levels[f"p{last}"]
        self._out_feature_strides, self._out_features = strides, list(strides)
        self._out_feature_channels = dict.fromkeys(strides, out_channels)

    @property
    def size_divisibility(self) -> int:
        """The square, so that Detectron2 pads to it, and whatever is larger to twice that."""
        return self.square_size

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        tokens = self.bottom_up(images)[TOKENS]
        maps = [self.get_submodule(name)(tokens) for name in self._levels]
        if self.top_block is not None:
            maps.extend(self.top_block(maps[-1]))
        return dict(zip(self._out_features, maps, strict=True))


def _level(body: VisionTransformer, stride: int, out_channels: int, norm: str) -> nn.Sequential:
    """From the tokens' map to one level: to its stride, to its channels, and over neighbours."""
    width, kind = body.output_shape()[TOKENS].channels, pyramid_norm(norm)

    def conv(inside: int, size: int) -> Conv2d:
        made = get_norm(kind, out_channels)
        return Conv2d(inside, out_channels, size, padding=size // 2, bias=not norm, norm=made)

    scaled = [nn.MaxPool2d(2)] if stride == 32 else []
    if stride < _PATCH:
        scaled, width = [nn.ConvTranspose2d(width, width // 2, 2, 2)], width // 2
    if stride < _PATCH // 2:
        scaled += [get_norm(kind, width)] if norm else []
        scaled, width = (
            [*scaled, nn.GELU(), nn.ConvTranspose2d(width, width // 2, 2, 2)],
            width // 2,
        )
    return nn.Sequential(*scaled, conv(width, 1), conv(out_channels, 3))


def _pyramid(cfg: CfgNode, input_shape: ShapeSpec, default: str) -> SimplePyramid:
    """Over MODEL.TIMM.NAME and MODEL.VIT; ``default`` is what MODEL.TIMM.TOP_BLOCK "default" means.

    Raises:
        UserError: a key that does not fit; names it.
    """
    timm_cfg, fpn, square = cfg.MODEL.TIMM, cfg.MODEL.FPN, cfg.MODEL.VIT.SQUARE
    refuse_freezing(cfg)
    levels = {f"p{name[3:]}": x for name, x in stage_strides(fpn.IN_FEATURES).items()}
    last = list(levels)[-1]
    above = top_block(cfg, default, last, fpn.OUT_CHANNELS)
    coarsest = levels[last] * 2 ** getattr(above, "num_levels", 0)
    step = max(coarsest, _PATCH)
    if square < 1 or square % step:
        raise UserError(
            f"{KEY} {square}: expected a multiple of {step} pixels, the stride of the coarsest "
            f"level (MODEL.FPN.IN_FEATURES, MODEL.TIMM.TOP_BLOCK)"
        )
    body = VisionTransformer(timm_cfg.NAME, square, input_shape.channels, timm_cfg.PRETRAINED)
    warn_of_other_images(cfg, body.expected)
    return SimplePyramid(body, levels, fpn.OUT_CHANNELS, fpn.NORM, above)


@BACKBONE_REGISTRY.register()
def build_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimplePyramid:
    """For R-CNN: p2-p5 from MODEL.FPN.IN_FEATURES, and p6 by max-pooling."""
    return _pyramid(cfg, input_shape, "maxpool")


@BACKBONE_REGISTRY.register()
def build_retinanet_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimplePyramid:
    """For dense detectors: p3-p5 from MODEL.FPN.IN_FEATURES, and p6, p7 by convolutions of p5."""
    return _pyramid(cfg, input_shape, "p6p7")
