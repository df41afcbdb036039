"""The checkpoint's student in PyTorch, run by Detectron2 itself: what a graph is compared with."""

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.data import DatasetMapper

from deploy.errors import UserError
from deploy.load import load_student
from deploy.serving.paste import encode_rle


class EagerDetector:
    """Detectron2's own reading, resizing, inference and post-processing.

    Args:
        checkpoint: .pth written by train_net.py.
        score_threshold: the graph's; the same as the config's unless the export changed it.
        device: "cpu" or "cuda".
        proposals: the graph's, of R-CNN; 0 for the config's.
    Raises:
        UserError: as `deploy.load.load_student`, or no CUDA device.
    """

    def __init__(self, checkpoint, score_threshold: float, device: str = "cpu", proposals: int = 0):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("this PyTorch sees no CUDA device to run the checkpoint on")
        self.student = load_student(
            checkpoint, score_threshold=score_threshold, proposals=proposals or None
        )
        self.classes: List[str] = self.student.classes
        self.model = self.student.model.to(device)
        self._read = DatasetMapper(self.student.cfg, is_train=False)

    def detect(self, record: Dict[str, Any]) -> Tuple:
        """Boxes (R, 4) xyxy in pixels of the image, scores (R,), labels (R,) of one image, and the
        masks as COCO's RLE (None without a mask head).

        Args:
            record: "file", "height", "width", "id" of deploy.coco_data.CocoData.images.
        """
        size = {key: record[key] for key in ("height", "width")}
        inputs = self._read({"file_name": record["file"], "image_id": record["id"], **size})
        (instances,) = self.run([inputs])
        masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
        return (
            instances.pred_boxes.tensor.numpy(),
            instances.scores.numpy(),
            instances.pred_classes.numpy(),
            masks if masks is None else [encode_rle(mask) for mask in masks],
        )

    def run(self, inputs: Sequence[Dict[str, Any]]) -> List:
        """Instances of each input (Detectron2's format), on the CPU: nothing is left running."""
        with torch.no_grad():
            return [output["instances"].to("cpu") for output in self.model(list(inputs))]

    @staticmethod
    def as_inputs(images: Sequence[np.ndarray]) -> List[Dict[str, torch.Tensor]]:
        """Detectron2's input format from prepared images (h, w, 3) uint8; no postprocessing."""
        return [{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())} for image in images]
