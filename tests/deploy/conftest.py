"""Tiny students with well-conditioned weights, each exported once by the command itself."""

import fcntl
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.checks.matching import Found, match_detections
from deploy.checks.tiny import CANVAS, CLASSES, conditioned, scenes, tiny_cfg  # noqa: F401  tests do
from deploy.export import main
from deploy.graphs import exportable
from deploy.runtime import OrtDetector
from deploy.serving.time_limit import DEFAULT, limit_time
from deploy.spec import ModelSpec
from tests.conftest import make_tiny_cfg

SIZES = [CANVAS, (96, 70), (50, 128)]  # of a ragged batch
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


def make_cfg(arch):
    cfg = make_tiny_cfg(arch)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = CANVAS
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 200
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    if arch == "RetinaNet":  # large enough to overlap their neighbours, or NMS had nothing to do
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    return cfg


def toy_cfg(arch):
    """A tiny detector by its meta-architecture: p2-p6, of which RetinaNet takes p3-p5."""
    return tiny_cfg("Faster R-CNN" if arch == "GeneralizedRCNN" else arch)


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


@pytest.fixture(autouse=True)
def _default_time_limit():
    """Commands set it for their process."""
    yield
    limit_time(DEFAULT)


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory):
    """Factory: cfg, command line options -> Exported, made by `export.main`.

    One folder serves all pytest processes, since most of an export's time is the exporter's: what
    is in it is read only.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def make(cfg, *options):
        key = hashlib.sha256(repr((cfg.dump(), options)).encode()).hexdigest()[:16]
        folder, model = shared / f"export_{key}", conditioned(cfg)
        made = Exported(model, folder / "student.pth", folder / "student_onnx")
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.folder.exists():
                save_checkpoint(model, cfg, made.checkpoint)
                assert main([str(made.checkpoint), *options]) == 0
        return made

    return make


def detectron2_outputs(model, images, sizes):
    """Detectron2's detections as (boxes, scores, labels) of each image alone."""
    batch = [{"image": image[:, :h, :w]} for image, (h, w) in zip(images, sizes, strict=True)]
    with torch.no_grad():
        results = [model([image])[0] for image in batch]
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


def assert_equal_masks(outputs, expected, mask=1e-4):
    """As `assert_equal_detections` for `Found`s with masks; masks past num_dets are 0."""
    assert_equal_detections(outputs[:4], [found[:3] for found in expected])
    counts, boxes, scores, labels, masks = (np.asarray(output) for output in outputs)
    for i, wanted in enumerate(expected):
        n = counts[i, 0]
        actual = Found(boxes[i, :n], scores[i, :n], labels[i, :n], masks[i, :n])
        for row, other in match_detections(wanted, actual).pairs:
            np.testing.assert_allclose(actual.masks[other], wanted.masks[row], atol=mask, rtol=0)
        assert not masks[i, n:].any()


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
def tiny(export_tiny):
    """Name in `deploy.checks.tiny.TINY` -> Exported with the default options."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = export_tiny(tiny_cfg(name))
        return made[name]

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
    """The outputs of the file for images (B, 3, H, W) and their true sizes."""
    detector = OrtDetector(path)
    images = images.numpy().astype(detector.spec.input_dtype)
    return list(detector.run(images, np.array(sizes, np.int32)).values())
