"""The teacher under attack: its classification losses as a function of an image."""

import hashlib
from typing import Dict, List, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..data.checks import NUM_CLASSES_KEYS, config_value
from ..data.images import ImageMapper
from ..distillation.teacher import teacher_config
from ..doctor.dataset import check_teacher_classes
from ..doctor.findings import FAULT
from ..doctor.untouched import untouched
from ..errors import UserError
from ..weights import load_complete
from .attack import Settings, attack


class Victim:
    """A whole teacher, frozen.

    Args:
        cfg: of the training that will use the images. Images get its test size, which is what the
            teacher sees in training up to augmentation.
        classes: names of the training set's.
    Raises:
        UserError: no teacher, or one of other classes, other channels, or without a classification
            loss: what is attacked would mean nothing.
    """

    def __init__(self, cfg: CfgNode, classes: List[str]):
        node = cfg.MODEL.DISTILLER.TEACHER
        if not node.WEIGHTS:
            raise UserError("MODEL.DISTILLER.TEACHER.WEIGHTS is empty: name the teacher to attack")
        config = _boxes_alone(teacher_config(cfg))
        self.format = config.INPUT.FORMAT
        if self.format not in ("BGR", "RGB"):
            raise UserError(f"teacher INPUT.FORMAT {self.format!r} is neither BGR nor RGB")
        self.model = build_model(config).requires_grad_(False)
        report = load_complete(self.model, node.WEIGHTS)
        key = NUM_CLASSES_KEYS.get(config.MODEL.META_ARCHITECTURE)
        outputs = config_value(config, key) if key else None
        finding = check_teacher_classes(classes, report.classes, outputs)
        if finding.verdict == FAULT:
            raise UserError(
                f"teacher {node.WEIGHTS}: {finding.found}. The attack needs one of the same classes"
            )
        train_without_statistics(self.model)
        self.test_size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self._mapper = ImageMapper(is_train=True, augmentations=[], image_format=self.format)

    def mislead(self, record: dict, name: str, settings: Settings) -> Tensor:
        """(3, H, W) uint8 RGB: the image of a dataset dict, changed so that its classes are missed.

        Random numbers are made from ``name`` alone.

        Raises:
            BadImage: it cannot be read, or has another size than the dict says.
        """
        sample = self._mapper(record)
        image = sample["image"]
        size = self._network_size(*image.shape[-2:])
        instances = _resized(sample["instances"], size)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        model = self.model
        # What a forward in training mode leaves behind would reach the images after it.
        with untouched(model):
            torch.manual_seed(seed)
            loss = lambda seen: self.loss(seen, instances)  # noqa: E731
            found = attack(image, model.pixel_mean, model.pixel_std, size, loss, settings)
        return found.flip(0) if self.format == "BGR" else found

    def loss(self, image: Tensor, instances: Instances) -> Tensor:
        """The sum of its classification losses on one image (3, H, W) of 0..255.

        Inside an EventStorage.
        """
        height, width = image.shape[-2:]
        inputs = {"image": image, "instances": instances, "height": height, "width": width}
        return classification(self.model([inputs]))

    def _network_size(self, height: int, width: int) -> Tuple[int, int]:
        shortest, longest = self.test_size
        if shortest == 0:  # Detectron2's word for "as it is"
            return height, width
        return T.ResizeShortestEdge.get_output_shape(height, width, shortest, longest)


def _boxes_alone(cfg: CfgNode) -> CfgNode:
    """Without the heads of masks and keypoints, which need labels that say nothing of classes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
    cfg.VIS_PERIOD = 0
    return cfg


def _resized(instances: Instances, size: Tuple[int, int]) -> Instances:
    height, width = instances.image_size
    boxes = Boxes(instances.gt_boxes.tensor.float())
    boxes.scale(size[1] / width, size[0] / height)
    return Instances(size, gt_boxes=boxes, gt_classes=instances.gt_classes)


def train_without_statistics(model: nn.Module) -> None:
    """Detectron2's detectors give losses in training mode; whatever that changes besides is off.

    The backbone, and normalisation and dropout everywhere, stay in eval mode, as the teacher's do
    when it teaches.
    """
    model.train()
    model.backbone.eval()
    for module in model.modules():
        is_leaf = next(module.children(), None) is None
        if is_leaf or isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


def classification(losses: Dict[str, Tensor]) -> Tensor:
    """Sum of the losses about classes: "loss_cls", "loss_rpn_cls", "loss_cls_stage2", ...

    Every detector of Detectron2 and of this project has the word "cls" in their names.

    Raises:
        UserError: there is none.
    """
    found = [value for name, value in losses.items() if "cls" in name.split("_")]
    if not found:
        raise UserError(
            f"the teacher has no classification loss to attack; it has {', '.join(losses)}"
        )
    return sum(found)
