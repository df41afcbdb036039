"""Public teachers of which Detectron2 has no yaml: their models, described, and their weights.

Its authors publish them with LazyConfig files, Python code that is not part of the installed
package. What those of projects/ViTDet say of the model is said here, over Detectron2's own base
models; those of new_baselines are installed. Drop path is left as it is: a teacher has none.
"""

from functools import partial
from typing import Callable, Dict, List, NamedTuple, Sequence

from detectron2 import model_zoo, modeling
from detectron2.config import LazyCall
from omegaconf import DictConfig
from torch import nn

_VITDET = "detectron2://ViTDet/COCO/"
_SQUARE = 1024  # pixels; what their training images were padded to


class Entry(NamedTuple):
    """One teacher.

    Attributes:
        needs: names of detectron2.modeling, which Detectron2 v0.6 lacks.
        weights: their address. describe: the model, not yet built.
    """

    needs: Sequence[str]
    weights: str
    describe: Callable[[], DictConfig]


def _base(name: str) -> DictConfig:
    return model_zoo.get_config(f"common/models/{name}.py").model


def _cascade(model: DictConfig) -> DictConfig:
    """With three box heads, each of four convolutions and one layer."""
    heads = _base("cascade_rcnn").roi_heads
    heads.mask_head.conv_norm = "LN"
    for head in heads.box_heads:
        head.conv_dims, head.fc_dims, head.conv_norm = [256] * 4, [1024], "LN"
    model.roi_heads = heads
    return model


def _vitdet_b() -> DictConfig:
    return _base("mask_rcnn_vitdet")


def _vitdet_l() -> DictConfig:
    model = _vitdet_b()
    net = model.backbone.net
    net.embed_dim, net.depth, net.num_heads = 1024, 24, 16
    net.window_block_indexes = [i for i in range(24) if i % 6 != 5]  # the others: global attention
    return model


def _pyramid(bottom_up: DictConfig, in_features: List[str]) -> DictConfig:
    """A Cascade Mask R-CNN whose FPN over ``bottom_up`` has layer normalisation."""
    model = _base("mask_rcnn_fpn")
    backbone = model.backbone
    backbone.bottom_up, backbone.in_features = bottom_up, in_features
    backbone.norm, backbone.square_pad = "LN", _SQUARE
    model.proposal_generator.head.conv_dims = [-1, -1]
    model.input_format = "RGB"
    model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    return _cascade(model)


def _swin_b() -> DictConfig:
    body = LazyCall(modeling.SwinTransformer)(
        embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]
    )
    return _pyramid(body, ["p0", "p1", "p2", "p3"])


def _mvitv2_b() -> DictConfig:
    stages = ["scale2", "scale3", "scale4", "scale5"]
    body = LazyCall(modeling.MViT)(
        embed_dim=96,
        depth=24,
        num_heads=1,
        last_block_indexes=[1, 4, 20, 23],
        residual_pooling=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_features=stages,
    )
    return _pyramid(body, stages)


def _new_baselines() -> Dict[str, Entry]:
    """Mask R-CNN, trained long on images of all scales; Detectron2's zoo has the weights."""
    found = {}
    for body in ("R_50", "R_101", "regnetx_4gf_dds", "regnety_4gf_dds"):
        for epochs in (100, 200, 400):
            name = f"mask_rcnn_{body}_FPN_{epochs}ep_LSJ"
            path = f"new_baselines/{name}.py"
            weights = "detectron2://" + model_zoo.get_checkpoint_url(path).split("/detectron2/")[1]
            found[name] = Entry((), weights, lambda path=path: model_zoo.get_config(path).model)
    return found


_VIT = ("ViT", "SimpleFeaturePyramid")
TEACHERS: Dict[str, Entry] = {
    "mask_rcnn_vitdet_b": Entry(
        _VIT, f"{_VITDET}mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl", _vitdet_b
    ),
    "mask_rcnn_vitdet_l": Entry(
        _VIT, f"{_VITDET}mask_rcnn_vitdet_l/f325599698/model_final_6146ed.pkl", _vitdet_l
    ),
    "cascade_mask_rcnn_vitdet_b": Entry(
        _VIT,
        f"{_VITDET}cascade_mask_rcnn_vitdet_b/f325358525/model_final_435fa9.pkl",
        lambda: _cascade(_vitdet_b()),
    ),
    "cascade_mask_rcnn_vitdet_l": Entry(
        _VIT,
        f"{_VITDET}cascade_mask_rcnn_vitdet_l/f328021305/model_final_1a9f28.pkl",
        lambda: _cascade(_vitdet_l()),
    ),
    "cascade_mask_rcnn_swin_b_in21k": Entry(
        ("SwinTransformer",),
        f"{_VITDET}cascade_mask_rcnn_swin_b_in21k/f342979038/model_final_246a82.pkl",
        _swin_b,
    ),
    "cascade_mask_rcnn_mvitv2_b_in21k": Entry(
        ("MViT",),
        f"{_VITDET}cascade_mask_rcnn_mvitv2_b_in21k/f325820315/model_final_8c3da3.pkl",
        _mvitv2_b,
    ),
    **_new_baselines(),
}
