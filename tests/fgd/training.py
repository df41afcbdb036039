"""A COCO set of six random images and configs that train on it in about 0.1 s per step."""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image

from fgd.data.datasets import register_from_config
from tests.conftest import make_tiny_cfg

CLASSES = ["square", "disc", "cross"]


def write_dataset(folder: Path) -> Path:
    """Six noise images of alternating orientation with two boxes each; returns the JSON's path."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    coco = {"info": {}, "images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    for i in range(6):
        width, height = ((96, 64), (64, 96))[i % 2]
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        size = {"width": width, "height": height}
        coco["images"].append({"id": i, "file_name": f"{i}.png", **size})
        for j in range(2):
            box = [4 + 20 * j, 6 + 4 * i, 24, 30]
            annotation = {"id": 2 * i + j + 1, "image_id": i, "category_id": 1 + (i + j) % 3}
            coco["annotations"].append({**annotation, "bbox": box, "area": 720, "iscrowd": 0})
    path = folder / "data.json"
    path.write_text(json.dumps(coco))
    return path


def training_cfg(folder: Path, arch: str = "RetinaNet", opts: tuple = ()) -> CfgNode:
    """Config of an 8-step run with OUTPUT_DIR ``folder``/out on the set of `write_dataset`."""
    path = folder / "data" / "data.json"
    if not path.exists():
        write_dataset(path.parent)
    cfg = make_tiny_cfg(arch)
    cfg.DATASETS.JSON.TRAIN = cfg.DATASETS.JSON.TEST = str(path)
    # Read for methods that ask for second images alone; their tests have better ones.
    cfg.DATASETS.TRAIN_SECOND_IMAGES = str(path.parent / "images")
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 64)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 1
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.MAX_ITER = 8
    cfg.SOLVER.STEPS = (6,)
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    cfg.OUTPUT_DIR = str(folder / "out")
    cfg.merge_from_list(list(opts))
    return register_from_config(cfg)


def distilled(cfg: CfgNode, folder: Path, teacher_arch: str = "", channels: int = 24) -> CfgNode:
    """The same under a random teacher written to ``folder``, of its own kind unless told."""
    teacher = make_tiny_cfg(teacher_arch or cfg.MODEL.META_ARCHITECTURE, channels=channels)
    torch.save({"model": build_model(teacher).state_dict()}, folder / "teacher.pth")
    (folder / "teacher.yaml").write_text(teacher.dump())
    cfg = cfg.clone()
    cfg.MODEL.DISTILLER.STUDENT = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(folder / "teacher.pth")
    cfg.DOCTOR.MIN_AP50 = 0.0  # random weights on purpose
    return cfg


def taught_by_timm(cfg: CfgNode, folder: Path, name: str = "test_vit") -> CfgNode:
    """The same under a network of timm with random weights, written to ``folder`` as timm's own.

    FGD compares its tokens with p4, cell by cell.
    """
    torch.manual_seed(3)
    torch.save(timm.create_model(name).state_dict(), folder / "network.pth")
    cfg = cfg.clone()
    cfg.MODEL.DISTILLER.STUDENT = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.LEVELS = ["p4"]
    cfg.MODEL.DISTILLER.TEACHER.TIMM = name
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(folder / "network.pth")
    return cfg


def assert_equal(a, b, path=""):
    """Deep, bit by bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path  # NaN is the same as NaN here
