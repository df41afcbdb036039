"""Who labels: a checkpoint in PyTorch or an exported graph, asked alike for one image file."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np

from deploy.coco_ap import Result
from deploy.errors import UserError
from deploy.runtime import GraphDetector
from deploy.serving.paste import encode_rle


class Teacher(ABC):
    """A detector that labels.

    Attributes:
        name: of its file. sha256: of the file's bytes. classes: in the order of labels.
    """

    name: str
    sha256: str
    classes: List[str]

    @abstractmethod
    def detect(self, file: Path) -> Dict[str, Any]:
        """All detections in an image, for a journal: "height" and "width" of the image upright,
        "boxes" xyxy in its pixels, "scores", "labels", and "masks" (COCO's RLE) where it has them.

        Raises:
            UserError: the image cannot be used, or the network fails on it.
        """


class GraphTeacher(Teacher):
    """An .onnx file of deploy/export.py in ONNX Runtime; see `GraphDetector`."""

    def __init__(self, path: str, device: str = "cpu"):
        self._detector = GraphDetector(path, [device])
        self.name, self.sha256 = path, self._detector.sha256
        self.classes = self._detector.spec.classes

    def detect(self, file: Path) -> Dict[str, Any]:
        (found,) = self._detector.detect([file])
        masks = None if found.masks is None else found.bitmaps()
        return _entry(found.size, found.boxes, found.scores, found.labels, masks)


class CheckpointTeacher(Teacher):
    """A .pth file of train_net.py in Detectron2, with the config in it; see `load_student`."""

    def __init__(self, path: str, device: str = "cpu"):
        # PyTorch and Detectron2, which a graph does not need
        import torch

        from deploy.load import load_student
        from fgd.data.images import ImageMapper

        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA device")
        student = load_student(path)
        self.name, self.sha256, self.classes = path, student.checkpoint_sha256, student.classes
        self._model = student.model.to(device)
        self._read = ImageMapper(student.cfg, is_train=False)
        self._no_grad = torch.no_grad

    def detect(self, file: Path) -> Dict[str, Any]:
        sample = self._read({"file_name": str(file)})
        with self._no_grad():
            found = self._model([sample])[0]["instances"].to("cpu")
        boxes, scores = found.pred_boxes.tensor.numpy(), found.scores.numpy()
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise UserError(f"{self.name} gives NaN or infinity for {file}")
        masks = found.pred_masks.numpy() if found.has("pred_masks") else None
        size = (sample["height"], sample["width"])
        return _entry(size, boxes, scores, found.pred_classes.numpy(), masks)


def _entry(size, boxes, scores, labels, masks) -> Dict[str, Any]:
    entry = {
        "height": int(size[0]),
        "width": int(size[1]),
        "boxes": [[round(float(x), 3) for x in box] for box in boxes],
        "scores": [round(float(score), 6) for score in scores],
        "labels": [int(label) for label in labels],
    }
    if masks is not None:
        entry["masks"] = [encode_rle(mask) for mask in masks]
    return entry


def as_result(entry: Dict[str, Any]) -> Result:
    """What `Teacher.detect` found, boxes alone, to be measured."""
    boxes = np.array(entry["boxes"], np.float64).reshape(-1, 4)
    return Result(boxes, np.array(entry["scores"], np.float64), np.array(entry["labels"], np.int64))


def load_teacher(path: str, device: str = "cpu") -> Teacher:
    """By the name of the file: `GraphTeacher` for .onnx, else `CheckpointTeacher`.

    Raises:
        UserError: as these.
    """
    return (GraphTeacher if path.endswith(".onnx") else CheckpointTeacher)(path, device)


def check_classes(teacher: Teacher, names: Sequence[str], dataset: str) -> None:
    """UserError unless the names are equal, in the same order: labels are numbers in training."""
    if list(names) == teacher.classes:
        return
    pairs = list(zip(teacher.classes, names))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    ours, theirs = (
        repr(x[first]) if first < len(x) else "none" for x in (teacher.classes, list(names))
    )
    raise UserError(
        f"classes of {teacher.name} and of {dataset} differ: class {first} is {ours} in the "
        f"teacher, {theirs} in the dataset; expected the same names in the same order (of the "
        "dataset that is the order of category ids)"
    )
