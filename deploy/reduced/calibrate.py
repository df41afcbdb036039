"""Calibration: the images that fix the ranges of an int8 graph's activations."""

import hashlib
from pathlib import Path
from typing import Dict, Iterable, List, Sequence

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from deploy.errors import UserError
from deploy.serving.preprocess import load_image, make_batch, prepare
from deploy.serving.progress import show_progress
from deploy.spec import INPUT_NAMES, ModelSpec
from fgd_inputs.file_names import find_images

MOST = 64  # images, evenly spaced among those given; 205 gave no better ranges than 64


def calibration_files(folder, left_out: Iterable = ()) -> List[Path]:
    """At most `MOST` images below a folder, none of which is in `left_out`, e.g. the test set.

    Raises:
        UserError: no such folder, or no image remains.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--calibration {folder}: no such folder")
    test = {Path(file).resolve() for file in left_out}
    files = [path for path in find_images([folder]) if path.resolve() not in test]
    if not files:
        raise UserError(f"--calibration {folder}: all its images are in --dataset; give others")
    chosen = np.linspace(0, len(files) - 1, min(len(files), MOST)).round().astype(int)
    return [files[i] for i in chosen]


def describe(files: Sequence[Path]) -> Dict:
    """Number of images, and one SHA-256 over those of the files in their order."""
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in files]
    return {"images": len(files), "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}


class Reader(CalibrationDataReader):
    """One image after the other, resized and padded exactly as the runtime does it."""

    def __init__(self, files: Sequence[Path], spec: ModelSpec):
        self.files, self.spec = list(files), spec
        self.set_range(0, len(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Which images `get_next` gives from now on."""
        self.pending, self.end = self.files[start_index:end_index], end_index

    def get_next(self):
        """Inputs of the graph by name, or None at the end."""
        if not self.pending:
            return None
        image = prepare(load_image(self.pending.pop(0)), self.spec)
        done = min(self.end, len(self)) - len(self.pending)
        show_progress(done, len(self), "calibration images")
        return dict(zip(INPUT_NAMES, make_batch([image], self.spec), strict=True))
