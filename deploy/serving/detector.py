"""Detector: images in, detections out, wherever the graph runs. numpy and Pillow only."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from deploy.errors import UserError
from deploy.serving.paste import paste_mask
from deploy.serving.preprocess import (
    MAX_PIXELS,
    ImageSource,
    load_image,
    make_batch,
    prepare,
    resized_shape,
)
from deploy.spec import MASKS, ModelSpec

_ROUNDING = 1e-3  # of a score in 0..1


@dataclass
class Detections:
    """What was found in one image; R may be 0.

    boxes (R, 4) float32 xyxy in pixels of the original image, inside it, none of them empty;
    scores (R,) float32 in [0, 1], descending; labels (R,) int64 indexing the spec's `classes`;
    size (height, width) of the original image; input_size (height, width) the network saw;
    shrunk: a fixed canvas made that smaller than Detectron2 would have (expect lower accuracy);
    masks (R, M, M) float32, probabilities on a grid over each box; None if the model has none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    size: Tuple[int, int]
    input_size: Tuple[int, int]
    shrunk: bool = False
    masks: Optional[np.ndarray] = None

    def bitmaps(self) -> Iterator[np.ndarray]:
        """Each detection's mask on the whole image, (height, width) bool, pasted as Detectron2
        does. One at a time: all of a large image would not fit into memory. None without masks."""
        for mask, box in zip(() if self.masks is None else self.masks, self.boxes):
            yield paste_mask(mask, box, self.size)


class Detector(ABC):
    """An exported detector with the reading and resizing around it that training used.

    A subclass runs the graph: it defines `run` and sets
        name: what to call the model in messages;
        identity: tells this model from any other;
        spec: its ModelSpec;
        max_batch: the most images per run, None for any number;
        min_score: drop detections scored lower; None keeps all that the graph returns;
        max_pixels: larger images are refused before they are decoded.
    """

    name: str
    identity: str
    spec: ModelSpec
    max_batch: Optional[int] = None
    min_score: Optional[float] = None
    max_pixels: int = MAX_PIXELS

    @abstractmethod
    def run(self, images: np.ndarray, image_sizes: np.ndarray) -> Dict[str, np.ndarray]:
        """The graph alone on what `make_batch` returns; its outputs by name, B rows each."""

    def detect(self, images: Sequence[ImageSource], batch_size: int = 1) -> List[Detections]:
        """Detections of each image, in order; none for no images.

        Args:
            images: paths, PIL images or (H, W, 3) uint8 BGR arrays, of any sizes.
            batch_size: how many share one run, as far as the graph allows. Images that share a run
                share a canvas, which can change scores slightly, as in training.
        Raises:
            UserError: an image cannot be read or is too thin, or the network gives NaN, infinity
                or what its spec does not allow; nothing is returned for the others then.
        """
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}, expected 1 or more")
        size = min(batch_size, self.max_batch or batch_size)
        detections = []
        for start in range(0, len(images), size):
            sources = images[start : start + size]
            arrays = [load_image(source, self.max_pixels) for source in sources]
            prepared = [prepare(array, self.spec) for array in arrays]
            outputs = self.run(*make_batch(prepared, self.spec))
            self._check_tensors(outputs, len(sources))
            for i, (array, image) in enumerate(zip(arrays, prepared, strict=True)):
                rows = {name: output[i] for name, output in outputs.items()}
                detections.append(self._detections(rows, array.shape[:2], image.shape[:2]))
        return detections

    def detect_each(
        self, images: Sequence[ImageSource]
    ) -> List[Tuple[Optional[np.ndarray], Union[Detections, UserError]]]:
        """As `detect` on all images at once, but a bad image leaves the others alone.

        Returns:
            Per image its pixels (H, W, 3) uint8 BGR, None if they cannot be read, and what was
            found or what is wrong.
        """
        arrays, results = {}, {}
        for i, source in enumerate(images):
            try:
                arrays[i] = load_image(source, self.max_pixels)
            except UserError as error:
                results[i] = error
        try:
            found = self.detect(list(arrays.values()), batch_size=max(len(arrays), 1))
            results.update(zip(arrays, found, strict=True))
        except UserError:  # does not say which one: ask for each alone
            for i, array in arrays.items():
                try:
                    (results[i],) = self.detect([array])
                except UserError as error:
                    results[i] = error
        return [(arrays.get(i), results[i]) for i in range(len(images))]

    def _check_tensors(self, outputs: Dict[str, np.ndarray], images: int) -> None:
        """UserError unless types and shapes are the spec's, whatever the graph declares."""
        for name, tensor in self.spec.interface()["outputs"].items():
            expected, found = (images, *tensor["shape"][1:]), outputs.get(name)
            if found is None or found.dtype != tensor["dtype"] or found.shape != expected:
                actual = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise UserError(
                    f"{self.name} answers {actual} for {name}, expected {tensor['dtype']} "
                    f"{list(expected)}"
                )

    def _detections(self, rows, size, input_size) -> Detections:
        count = int(rows["num_dets"][0])
        if not 0 <= count <= len(rows["boxes"]):
            raise UserError(
                f"{self.name} gives {count} detections, expected 0..{len(rows['boxes'])}"
            )
        boxes, scores, labels = (rows[name][:count] for name in ("boxes", "scores", "labels"))
        masks = rows[MASKS][:count] if self.spec.mask_size else None
        # all scores: an image that the network failed on has no detection, but scores of NaN
        finite = [boxes, rows["scores"], *([] if masks is None else [masks])]
        if not all(np.isfinite(values).all() for values in finite):
            raise UserError(
                f"{self.name} gives NaN or infinity for an image of {size}: its "
                "weights are damaged, or it overflows on this provider"
            )
        self._check_range("class", labels, 0, len(self.spec.classes) - 1)
        self._check_range("score", scores, 0, 1)
        if masks is not None:
            self._check_range("mask value", masks, 0, 1)
        boxes = rescale(boxes, input_size, size)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        if self.min_score is not None:
            keep &= scores >= self.min_score
        shrunk = input_size != resized_shape(*size, self.spec.min_size, self.spec.max_size)
        labels = labels[keep].astype(np.int64)
        masks = None if masks is None else masks[keep]
        return Detections(boxes[keep], scores[keep], labels, size, input_size, shrunk, masks)

    def _check_range(self, what: str, values: np.ndarray, least: int, most: int) -> None:
        beyond = values[(values < least - _ROUNDING) | (values > most + _ROUNDING)]
        if beyond.size:
            raise UserError(
                f"{self.name} gives a {what} of {beyond[0]:g}, expected {least}..{most}"
            )


def rescale(boxes: np.ndarray, input_size: Tuple[int, int], size: Tuple[int, int]) -> np.ndarray:
    """Boxes (R, 4) from the resized image to the original one, clipped to it (both as (h, w)).

    As Detectron2's `detector_postprocess`: rounding of the resized size makes the two scales
    differ slightly. Boxes may come out empty.
    """
    (input_h, input_w), (height, width) = input_size, size
    scale_x, scale_y = width / input_w, height / input_h
    with np.errstate(over="ignore"):  # infinity is clipped as well
        boxes = boxes * np.array([scale_x, scale_y] * 2, np.float32)
    return boxes.clip(0, np.array([width, height] * 2, np.float32))
