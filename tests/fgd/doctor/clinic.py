"""Coloured rectangles, a tiny teacher that has really learnt them, and a student to be taught."""

import json
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image

from fgd.data.stream import build_train_stream
from tests.conftest import make_tiny_cfg
from tests.fgd.training import CLASSES, training_cfg

TEACHER_STEPS = 120  # AP50 100 on its training images


def write_colours(folder: Path) -> None:
    """Eight noisy images of 64x64 with two rectangles each; the colour is the class."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    coco = {"info": {}, "images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    for i in range(8):
        pixels = generator.integers(90, 160, (64, 64, 3), dtype=np.uint8)
        coco["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        for j in range(2):
            label, x, y = (i + j) % 3, 4 + 30 * j, 6 + int(generator.integers(0, 26))
            colour = np.where(np.arange(3) == label, 235, 20)  # red, green, blue
            pixels[y : y + 26, x : x + 24] = colour + generator.integers(-15, 15, (26, 24, 3))
            annotation = {"id": 2 * i + j + 1, "image_id": i, "category_id": label + 1}
            box = {"bbox": [x, y, 24, 26], "area": 624, "iscrowd": 0}
            coco["annotations"].append({**annotation, **box})
        Image.fromarray(pixels).save(images / f"{i}.png")
    (folder / "data.json").write_text(json.dumps(coco))


def student_cfg(folder: Path, opts: tuple = ()) -> CfgNode:
    """A run of two steps on the rectangles, 4 images each; OUTPUT_DIR ``folder``/out."""
    if not (folder / "data").exists():
        write_colours(folder / "data")
    fixed = ("INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 2)
    return training_cfg(folder, opts=(*fixed, "SOLVER.STEPS", (1,), *opts))


def train_teacher(folder: Path) -> Path:
    """A RetinaNet of 24 channels, as a checkpoint with config and class names; returns its path."""
    cfg = make_tiny_cfg(channels=24)
    torch.manual_seed(1)
    model = build_model(cfg).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = iter(build_train_stream(student_cfg(folder)))
    # TorchScript rounds otherwise after its first calls, in whichever test they were.
    with EventStorage(0), torch.jit.optimized_execution(False):
        for _ in range(TEACHER_STEPS):
            optimizer.zero_grad()
            sum(model(next(batches)).values()).backward()
            optimizer.step()
    path = folder / "teacher.pth"
    save_teacher(path, cfg, model.state_dict())
    return path


def save_teacher(path: Path, cfg: CfgNode, state: dict, classes=tuple(CLASSES)) -> Path:
    torch.save({"model": state, "config": cfg.dump(), "classes": list(classes)}, path)
    return path


def distilled_cfg(folder: Path, teacher: Path, opts: tuple = ()) -> CfgNode:
    """The student's run under a teacher that has its config in its checkpoint."""
    cfg = student_cfg(folder)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DISTILLER.STUDENT = "Distiller", "RetinaNet"
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(teacher)
    cfg.DOCTOR.IMAGES, cfg.DOCTOR.BATCHES = 8, 2
    cfg.merge_from_list(list(opts))
    return cfg


def write_config(cfg: CfgNode, path: Path) -> Path:
    """As a user's yaml: DATASETS.JSON names the data. Nothing is evaluated."""
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.DATASETS.JSON.TEST = ""
    path.write_text(cfg.dump())
    return path
