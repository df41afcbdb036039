"""Tiny detectors with well-conditioned weights: what an export can be tried on without training."""

from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from PIL import Image
from torch import Tensor, nn

from deploy.checks.verify_images import draw_scene
from deploy.files import write_json
from fgd.config import get_fgd_cfg

CANVAS = (96, 128)  # height and width in pixels
CLASSES = ["disc", "box", "star"]
_CHANNELS = 16


class ToyBody(Backbone):
    """One convolution with a frozen norm per stage: traced in a third of a real one's time."""

    def __init__(self):
        super().__init__()
        self._out_features = ["res2", "res3", "res4", "res5"]
        self.stages = nn.ModuleList(
            Conv2d(
                i, 16, 5, stride=2 + 2 * (i == 3), padding=2, bias=False, norm=FrozenBatchNorm2d(16)
            )
            for i in (3, 16, 16, 16)
        )
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32), strict=True))
        self._out_feature_channels = dict.fromkeys(self._out_features, 16)

    def forward(self, x):
        features = {}
        for name, stage in zip(self._out_features, self.stages, strict=True):
            x = features[name] = torch.relu(stage(x))
        return features


@BACKBONE_REGISTRY.register()
def build_toy_fpn_backbone(cfg, input_shape: ShapeSpec):
    """p2-p6 over `ToyBody`, or fewer by MODEL.FPN.IN_FEATURES."""
    names = cfg.MODEL.FPN.IN_FEATURES
    return FPN(ToyBody(), names, cfg.MODEL.FPN.OUT_CHANNELS, "", LastLevelMaxPool())


def _base() -> CfgNode:
    cfg = get_fgd_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.BACKBONE.NAME = "build_toy_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = _CHANNELS
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = CANVAS
    return cfg


def _dense(architecture: str) -> CfgNode:
    cfg = _base()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    node = cfg.MODEL[architecture.upper()]
    node.IN_FEATURES, node.NUM_CLASSES, node.NUM_CONVS = ["p3", "p4", "p5"], len(CLASSES), 1
    node.TOPK_CANDIDATES_TEST = 200
    # of RetinaNet: large enough to overlap their neighbours, or NMS had nothing to do
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    return cfg


def _faster_rcnn() -> CfgNode:
    cfg = _base()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 100, 100
    heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    heads.NAME, heads.NUM_CLASSES = "StandardROIHeads", len(CLASSES)
    heads.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    box_head.NAME, box_head.NUM_FC, box_head.FC_DIM = "FastRCNNConvFCHead", 1, 32
    box_head.POOLER_RESOLUTION = 7
    return cfg


def _mask_rcnn() -> CfgNode:
    return _with_masks(_faster_rcnn())


def _cascade_rcnn() -> CfgNode:
    cfg = _faster_rcnn()
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    return cfg


def _cascade_mask_rcnn() -> CfgNode:
    return _with_masks(_cascade_rcnn())


def _with_masks(cfg: CfgNode) -> CfgNode:
    cfg.MODEL.MASK_ON = True
    head = cfg.MODEL.ROI_MASK_HEAD
    head.NAME, head.NUM_CONV, head.CONV_DIM = "MaskRCNNConvUpsampleHead", 1, _CHANNELS
    head.POOLER_RESOLUTION = 7
    return cfg


TINY: Dict[str, Callable[[], CfgNode]] = {
    "RetinaNet": partial(_dense, "RetinaNet"),
    "Faster R-CNN": _faster_rcnn,
    "Mask R-CNN": _mask_rcnn,
    "Cascade R-CNN": _cascade_rcnn,
    "Cascade Mask R-CNN": _cascade_mask_rcnn,
    "FCOS": partial(_dense, "FCOS"),
    "RepPoints": partial(_dense, "RepPoints"),
}


def tiny_cfg(name: str) -> CfgNode:
    """Config of a detector of `TINY` over `ToyBody`, 3 classes, canvas `CANVAS`."""
    return TINY[name]()


def scenes(count: int = 4, shape: Tuple[int, int] = CANVAS, seed: int = 1) -> Tensor:
    """(count, 3, h, w) float32 drawn images."""
    rng = np.random.default_rng(seed)
    images = np.stack([draw_scene(rng, shape) for _ in range(count)])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))


def write_scenes(folder: Path, model: nn.Module, count: int = 12) -> Path:
    """A COCO dataset of drawn images on which `model` is right: every second detection is true.

    Writes `folder`/annotations.json, `folder`/images/ and, for calibrating, other images in
    `folder`/others/. Returns the path of the JSON.
    """
    pixels = scenes(2 * count, seed=2).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    images, annotations = [], []
    for i, scene in enumerate(pixels):
        path = folder / ("images" if i < count else "others") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene[:, :, ::-1]).save(path)
        if i >= count:
            continue
        images.append({"id": i, "file_name": path.name, "height": CANVAS[0], "width": CANVAS[1]})
        with torch.no_grad():
            image = torch.from_numpy(scene.transpose(2, 0, 1).copy())
            found = model.eval()([{"image": image}])[0]["instances"][::2]
        for box, label in zip(found.pred_boxes.tensor.tolist(), found.pred_classes.tolist()):
            entry = {"id": len(annotations), "image_id": i, "category_id": label}
            x1, y1, x2, y2 = box
            annotations.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations.json", content)
    return folder / "annotations.json"


def conditioned(cfg: CfgNode) -> nn.Module:
    """A detector whose scores spread over 0..1 without training, the same on every machine.

    Batch norms take their statistics from drawn scenes, then each output layer is scaled so that
    its predictions there have a given mean and deviation.
    """
    torch.manual_seed(0)
    model, images = build_model(cfg), scenes()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # cumulative average
    for norm in (m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.running_var.uniform_(0.5, 2), norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-1, 1)
    for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.uniform_(norm.weight, 0.7, 1.3), nn.init.uniform_(norm.bias, -0.2, 0.2)
    batch = [{"image": image} for image in images]
    with torch.no_grad():
        model.train()
        features = model.backbone(model.preprocess_image(batch).tensor)
        if hasattr(model, "head"):
            model.head([features[f] for f in model.head_in_features])
        model.eval()
        features = model.backbone(model.preprocess_image(batch).tensor)
        for targets, run in _output_layers(model, features, batch):
            _spread(targets, run)
    return model


_Targets = List[Tuple[nn.Module, float, float]]  # layer, mean and deviation of what it predicts


def _output_layers(model, features, batch) -> List[Tuple[_Targets, Callable]]:
    """The output layers, first to last, and what to run to see their predictions."""
    if hasattr(model, "head"):
        head, levels = model.head, [features[f] for f in model.head_in_features]
        if hasattr(head, "refine_points"):  # in cells; the first ones move what the others read
            targets = [(head.init_points, 0.0, 1.0), (head.refine_points, 0.0, 0.5)]
            model.box2box_transform.moment.copy_(torch.tensor([0.3, 0.1]))
            return [([*targets, (head.cls_score, -2.0, 1.0)], lambda: head(levels))]
        targets = [(head.cls_score, -2.0, 1.0), (head.bbox_pred, 0.0, 0.3)]
        if hasattr(head, "ctrness"):  # its deltas are distances to the sides, in cells
            targets = [(head.cls_score, 0.0, 1.5), (head.bbox_pred, 2.0, 1.0)]
            targets.append((head.ctrness, 0.0, 1.5))
        return [(targets, lambda: head(levels))]
    rpn, heads = model.proposal_generator, model.roi_heads
    head, levels = rpn.rpn_head, [features[f] for f in rpn.in_features]
    targets = [(head.objectness_logits, 0.0, 2.0), (head.anchor_deltas, 0.0, 0.3)]
    layers = [(targets, lambda: head(levels))]
    predictors = heads.box_predictor
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        targets = [(predictor.cls_score, 0.0, 1.5), (predictor.bbox_pred, 0.0, 1.0)]
        layers.append((targets, lambda: model(batch)))
    if heads.mask_on:
        layers.append(([(heads.mask_head.predictor, 0.0, 2.0)], lambda: model(batch)))
    return layers


def _spread(targets: _Targets, run: Callable) -> None:
    """Scale each layer so that its outputs while `run` have the mean and deviation asked for."""
    for layer, mean, deviation in targets:
        seen = []
        hook = layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        run()
        hook.remove()
        values = torch.cat([output.movedim(1, -1).reshape(-1, len(layer.bias)) for output in seen])
        scale = deviation / (values - layer.bias).std()
        layer.weight.mul_(scale)
        layer.bias.copy_(mean + scale * (layer.bias - values.mean()))
