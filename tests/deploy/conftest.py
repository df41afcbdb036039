"""Tiny students with well-conditioned weights, exported once per session by the command itself."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from deploy.export import main
from deploy.spec import ModelSpec
from deploy.verify_images import draw_scene
from tests.conftest import make_tiny_cfg

CANVAS = (96, 128)
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


def scenes(count=4, shape=CANVAS, seed=1):
    """(count, 3, h, w) float32 drawn images."""
    rng = np.random.default_rng(seed)
    images = np.stack([draw_scene(rng, shape) for _ in range(count)])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))


def make_cfg(arch):
    cfg = make_tiny_cfg(arch)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = CANVAS
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 200
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
        targets = [(head.cls_score, -2.0, 2.0), (head.bbox_pred, 0.0, 0.3)]
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


def save_checkpoint(model, cfg, path, **changes):
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


@pytest.fixture(scope="session")
def exported(export_tiny):
    """architecture -> Exported with the default options."""
    made = {}

    def get(arch):
        if arch not in made:
            made[arch] = export_tiny(make_cfg(arch))
        return made[arch]

    return get
