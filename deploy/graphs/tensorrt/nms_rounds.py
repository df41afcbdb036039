"""Static NMS, whose rounds are fixed: how many, and whether they sufficed, read from the graph.

See `deploy.graphs.tensorrt.static_ops` for what it is.
"""

from dataclasses import dataclass
from typing import Dict, List

import numpy as np

# Rows that enter one suppression matrix: it takes ROWS**2 float32, 16.8 MB per image. Also under
# the 3840 that TensorRT's TopK sorts at most.
ROWS = 2048
ROUNDS = 12  # 3 to 8 were needed on drawn and real images
# Value inside the graph: 1 for rows kept after a round, 0 for the others, (B, rows, 2) with both
# columns the same; before the first round valid rows are. "raw." makes it readable from outside.
ROUND = "raw.nms.{}.round{:02d}"
_PREFIX, _ROUND = "raw.nms.", ".round"  # of its name


@dataclass
class Rounds:
    """Of all static NMS of a graph, over the images of all batches added."""

    made: int = 0  # rounds in the graph
    needed: int = 0  # rounds until nothing changed, if that is less than `made`
    unsettled: int = 0  # images in which the last round still changed something
    cut: int = 0  # images with `ROWS` or more candidates whose list of detections is not full

    def add(self, raw: Dict[str, np.ndarray], num_dets: np.ndarray, most: int) -> None:
        """Count one batch.

        Args:
            raw: raw values of the graph, by name.  num_dets: (B, 1).  most: detections per image.
        """
        unsettled = cut = np.zeros(len(num_dets), bool)
        for rounds in _by_nms(raw):
            # an image may have several, one per level
            values = [x.reshape(len(num_dets), -1, x.shape[1]) for x in rounds]
            changed = np.stack([(a != b).any(axis=(1, 2)) for a, b in zip(values, values[1:])])
            self.made = len(changed)
            self.needed = max([self.needed, *(np.flatnonzero(changed.any(axis=1)) + 1).tolist()])
            unsettled = unsettled | changed[-1]
            if values[0].shape[2] == ROWS:
                cut = cut | (values[0].all(axis=(1, 2)) & (num_dets[:, 0] < most))
        self.unsettled += int(unsettled.sum())
        self.cut += int(cut.sum())

    def warnings(self) -> List[str]:
        """What the user must know; [] when NMS was exact on all images."""
        texts = []
        if self.unsettled:
            texts.append(
                f"NOT CONVERGED: {self.made} rounds of static NMS were too few for "
                f"{self.unsettled} images; longer chains of overlapping boxes are decided wrongly"
            )
        if self.cut:
            texts.append(f"{ROWS} or more candidates entered NMS in {self.cut} images")
        return texts


def _by_nms(raw: Dict[str, np.ndarray]) -> List[List[np.ndarray]]:
    """Per NMS the (images, rows, 2) kept maps, before the first round and after each."""
    found: Dict[str, List[str]] = {}
    for name in sorted(name for name in raw if name.startswith(_PREFIX)):
        found.setdefault(name.rpartition(_ROUND)[0], []).append(name)
    return [[raw[name] for name in names] for names in found.values()]
