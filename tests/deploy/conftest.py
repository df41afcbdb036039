"""Tiny students with well-conditioned weights, exported once per session by the command itself."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from deploy.export import main
from deploy.graphs import exportable
from deploy.matching import Found, match_detections
from deploy.runtime import OrtDetector
from deploy.spec import ModelSpec
from deploy.verify_images import draw_scene
from tests.conftest import make_tiny_cfg

CANVAS = (96, 128)
SIZES = [CANVAS, (96, 70), (50, 128)]  # of a ragged batch
CLASSES = ["disc", "box", "star"]
ARCHITECTURES = ("RetinaNet", "GeneralizedRCNN")


@dataclass
class Exported:
    """A model and the folder that the export command made of it."""

    model: torch.nn.Module
    checkpoint: Path
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_json(self.folder / "model.json")


class ToyBody(Backbone):
    """One convolution with a frozen norm per stage: traced in a third of the time."""

    def __init__(self):
        super().__init__()
        self._out_features = ["res2", "res3", "res4", "res5"]
        self.stages = torch.nn.ModuleList(
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
    names = cfg.MODEL.FPN.IN_FEATURES
    return FPN(ToyBody(), names, cfg.MODEL.FPN.OUT_CHANNELS, "", LastLevelMaxPool())


def scenes(count=4, shape=CANVAS, seed=1):
    """(count, 3, h, w) float32 drawn images."""
    rng = np.random.default_rng(seed)
    images = np.stack([draw_scene(rng, shape) for _ in range(count)])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))


def make_cfg(arch):
    cfg = make_tiny_cfg(arch)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = CANVAS
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 200
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    if arch == "RetinaNet":  # large enough to overlap their neighbours, or NMS had nothing to do
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    return cfg


def toy_cfg(arch):
    """As `make_cfg` over `ToyBody`: p2-p6, of which RetinaNet takes p3-p5."""
    cfg = make_cfg(arch)
    cfg.MODEL.BACKBONE.NAME = "build_toy_fpn_backbone"
    if arch == "RetinaNet":
        cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    return cfg


def conditioned(cfg):
    """A student whose scores spread over 0..1 without training, the same on every machine.

    Batch norms take their statistics from drawn scenes, then each output layer is scaled so that
    its predictions there have a given mean and deviation.
    """
    torch.manual_seed(0)
    model, images = build_model(cfg), scenes()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # cumulative average
    for norm in (m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.running_var.uniform_(0.5, 2), norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-1, 1)
    batch = [{"image": image} for image in images]
    with torch.no_grad():
        model.train()
        features = model.backbone(model.preprocess_image(batch).tensor)
        if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
            model.head([features[f] for f in model.head_in_features])
        model.eval()
        features = model.backbone(model.preprocess_image(batch).tensor)
        scale_outputs(model, features, batch)
    return model


def scale_outputs(model, features, batch):
    if hasattr(model, "head"):
        head, levels = model.head, [features[f] for f in model.head_in_features]
        targets = [(head.cls_score, -2.0, 1.0), (head.bbox_pred, 0.0, 0.3)]
        spread(targets, lambda: head(levels))
        return
    rpn, heads = model.proposal_generator, model.roi_heads
    levels = [features[f] for f in rpn.in_features]
    head = rpn.rpn_head
    spread(
        [(head.objectness_logits, 0.0, 2.0), (head.anchor_deltas, 0.0, 0.3)], lambda: head(levels)
    )
    predictor = heads.box_predictor
    targets = [(predictor.cls_score, 0.0, 1.5), (predictor.bbox_pred, 0.0, 1.0)]
    spread(targets, lambda: model(batch))


def spread(targets, run):
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


def save_checkpoint(model, cfg, path, /, **changes):
    """What train_net.py would write."""
    torch.save(
        {
            "model": model.state_dict(),
            "config": cfg.dump(),
            "classes": CLASSES,
            "distiller": {"align.weight": torch.zeros(5, 7)},
            "format": "fgd-1",
            **changes,
        },
        path,
    )
    return path


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory):
    """Factory: cfg, command line options -> Exported, made by `export.main`."""

    def make(cfg, *options):
        folder = tmp_path_factory.mktemp("export")
        model = conditioned(cfg)
        checkpoint = save_checkpoint(model, cfg, folder / "student.pth")
        assert main([str(checkpoint), *options]) == 0
        return Exported(model, checkpoint, folder / "student_onnx")

    return make


def detectron2_outputs(model, images, sizes):
    """Detectron2's detections as (boxes, scores, labels) per image, padded to the whole canvas."""
    batch = [{"image": image[:, :h, :w]} for image, (h, w) in zip(images, sizes, strict=True)]
    with torch.no_grad():
        results = model([*batch, {"image": torch.zeros_like(images[0])}])[:-1]
    found = [result["instances"] for result in results]
    return [(i.pred_boxes.tensor.numpy(), i.scores.numpy(), i.pred_classes.numpy()) for i in found]


def assert_equal_detections(outputs, expected, box=1e-3, score=5e-5, at_least=5):
    """Each image's valid rows equal `expected`, in any order of near-ties; the rest is empty."""
    counts, boxes, scores, labels = (np.asarray(output) for output in outputs)
    assert counts[:, 0].tolist() == [len(scores) for _, scores, _ in expected]
    assert counts.sum() >= at_least, "vacuous: the tiny model must detect something"
    for i, wanted in enumerate(expected):
        n = counts[i, 0]
        actual, wanted = Found(boxes[i, :n], scores[i, :n], labels[i, :n]), Found(*wanted)
        pairs = match_detections(wanted, actual).pairs
        assert len(pairs) == n
        for row, other in pairs:
            np.testing.assert_allclose(actual.scores[other], wanted.scores[row], atol=score, rtol=0)
            np.testing.assert_allclose(actual.boxes[other], wanted.boxes[row], atol=box, rtol=0)
        assert (np.diff(scores[i]) <= 0).all()
        assert not boxes[i, n:].any() and not scores[i, n:].any() and (labels[i, n:] == -1).all()


@pytest.fixture(scope="session")
def exported(export_tiny):
    """architecture -> Exported with the default options."""
    made = {}

    def get(arch):
        if arch not in made:
            made[arch] = export_tiny(make_cfg(arch))
        return made[arch]

    return get


@pytest.fixture(scope="session")
def dynamic_retinanet(export_tiny):
    """RetinaNet over `ToyBody`, p3-p5, one batch norm per level in the head; any canvas, uint8."""
    cfg = toy_cfg("RetinaNet")
    cfg.MODEL.RETINANET.NORM = "BN"
    return export_tiny(cfg, "--dynamic", "image", "--input-dtype", "uint8")


@pytest.fixture(scope="session")
def agnostic_rcnn(export_tiny):
    """Faster R-CNN over `ToyBody` with one box per proposal; any canvas."""
    cfg = toy_cfg("GeneralizedRCNN")
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    return export_tiny(cfg, "--dynamic", "image")


@pytest.fixture(scope="session")
def toy_detector():
    """Exportable RetinaNet over `ToyBody`, not exported."""
    return exportable(conditioned(toy_cfg("RetinaNet")))


def ort_outputs(path, images, sizes):
    """The four outputs of the file for images (B, 3, H, W) and their true sizes."""
    detector = OrtDetector(path)
    images = images.numpy().astype(detector.spec.input_dtype)
    return list(detector.run(images, np.array(sizes, np.int32)).values())
