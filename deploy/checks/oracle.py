"""The two judges of a graph: Detectron2's own inference, and the network in double precision.

Neither knows the graph's engine, so that one serves all of them.
"""

import copy
from contextlib import contextmanager
from typing import Dict, Iterator, List, Sequence

import numpy as np
import torch
from torch import nn

from deploy.checks.matching import Found
from deploy.checks.verify_images import Batch
from deploy.graphs import exportable, exportable_class
from deploy.graphs.convert import RAW
from deploy.spec import OUTPUT_NAMES


@contextmanager
def score_threshold(model: nn.Module, path: str, value: float):
    """Set the attribute at a dotted `path` of `model` and put the old value back."""
    owner = model
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Detectron2:
    """What Detectron2 finds in some batches, inferred once for each score threshold."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        self.model, self.batches = model, batches
        self._found: Dict[float, List[List[Found]]] = {}

    def at(self, threshold: float) -> Iterator[List[Found]]:
        """Of each batch in turn, per image."""
        known = self._found.setdefault(threshold, [])
        path = exportable_class(self.model).threshold_path
        for i, batch in enumerate(self.batches):
            if i == len(known):
                with score_threshold(self.model, path, threshold):
                    known.append(detectron2_detections(self.model, batch))
            yield known[i]


@torch.no_grad()
def detectron2_detections(model: nn.Module, batch: Batch) -> List[Found]:
    """Detectron2's inference on each image of the batch alone, as its predictor and evaluation do.

    Together it would pad them to the largest, which changes features near the border, and averages
    over maps everywhere.
    """
    return [
        _infer(model, torch.from_numpy(np.ascontiguousarray(canvas[:, :height, :width])))
        for canvas, (height, width) in zip(batch.images, batch.image_sizes)
    ]


def _infer(model: nn.Module, image: torch.Tensor) -> Found:
    inputs = [{"image": image}]
    if not getattr(getattr(model, "roi_heads", None), "mask_on", False):
        return _found(model.eval()(inputs)[0]["instances"])
    # Without post-processing: it pastes masks. What else it does here is to drop empty boxes.
    (instances,) = model.eval().inference(inputs, do_postprocess=False)
    return _found(instances[instances.pred_boxes.nonempty()])


def _found(instances) -> Found:
    found = Found(
        instances.pred_boxes.tensor.numpy(),
        instances.scores.numpy(),
        instances.pred_classes.numpy(),
    )
    if instances.has("pred_masks"):  # (R, 1, M, M)
        found = found._replace(masks=instances.pred_masks[:, 0].numpy())
    return found


class RawJudge:
    """Errors of raw predictions against the network in float64, the graph's beside torch's own."""

    def __init__(self, model: nn.Module):
        self.single = exportable(model)
        self.double = copy.deepcopy(self.single).double()

    @torch.no_grad()
    def errors(self, batch: Batch, values: Dict[str, np.ndarray]) -> Dict[str, Dict[str, float]]:
        """Largest absolute errors on one batch.

        Args:
            values: the graph's raw predictions and outputs, named as in the file. Boxes it selected
                itself are given to both networks, so that rows correspond.
        Returns:
            name -> {"graph", "torch", "scale": largest absolute value}. Selections are left out.
        """
        images, sizes = (torch.from_numpy(array) for array in batch)
        given = {
            name: torch.from_numpy(values[name if name in OUTPUT_NAMES else RAW + name])
            for name in self.single.selections
        }
        single = self.single.network(images, sizes, **given)
        given = {name: value.double() for name, value in given.items()}
        double = self.double.network(images, sizes, **given)
        return {
            name: {
                "graph": _largest(values[RAW + name] - truth.numpy()),
                "torch": _largest((single[name].double() - truth).numpy()),
                "scale": _largest(truth.numpy()),
            }
            for name, truth in double.items()
            if name not in given
        }

    def cut_images(self, raw: Dict[str, np.ndarray], num_dets: np.ndarray) -> int:
        """`ExportableDetector.cut_images` for arrays of the graph."""
        return self.single.cut_images(as_tensors(raw), torch.from_numpy(num_dets))


def as_tensors(raw: Dict[str, np.ndarray]) -> Dict[str, torch.Tensor]:
    """A graph's raw predictions under the names that `ExportableDetector.network` gives them."""
    return {name[len(RAW) :]: torch.from_numpy(values) for name, values in raw.items()}


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max()) if x.size else 0.0
