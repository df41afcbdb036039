"""Files of less precision beside model.onnx: made, gated on AP, and only then given their name."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np
import onnx

from deploy.coco_data import CocoData, load_dataset
from deploy.errors import ParityError, UserError
from deploy.files import unnamed
from deploy.graphs.common import ExportableDetector
from deploy.load import Student
from deploy.reduced.calibrate import Reader, calibration_files, describe
from deploy.reduced.half import half_model
from deploy.reduced.layers import weighted_layers
from deploy.reduced.precision_gates import ApLoss, average_precision, verify_reduced
from deploy.reduced.quantize import RECIPES, int8_model
from deploy.spec import ModelSpec

PRECISIONS = ("fp16", "int8")
FILES = tuple(
    name.format(precision)
    for precision in PRECISIONS
    for name in ("model.{}.onnx", "model.{}.json", "model.{}.failed.onnx")
)


@dataclass
class Reduction:
    """What to make beside the float32 graph; see the options of the export command.

    Raises:
        UserError: int8 without calibration images or without a dataset to measure its AP on, no
            such recipe, or a bound that cannot be kept.
    """

    precisions: Sequence[str] = ()
    recipe: str = "onnx"
    calibration: Optional[str] = None
    dataset: Optional[str] = None
    images_root: Optional[str] = None
    max_ap_drop: float = 1.0

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise UserError(f"--recipe {self.recipe}: there is {', '.join(RECIPES)}")
        if not self.max_ap_drop > 0:
            raise UserError(f"--max-ap-drop {self.max_ap_drop:g} must be greater than 0")
        if "int8" in self.precisions and not self.calibration:
            raise UserError(
                "--precision int8 needs --calibration DIR: images like those it will see, "
                "to fix the ranges of its activations"
            )
        if "int8" in self.precisions and not self.dataset:
            raise UserError(
                "--precision int8 needs --dataset annotations.json: without labels nobody knows "
                "what int8 costs, so no such file is written"
            )

    def open(self, classes: Sequence[str]) -> "Inputs":
        """Everything read that can be refused before the export starts."""
        data = load_dataset(self.dataset, self.images_root) if self.dataset else None
        if data is not None:
            data.category_ids(classes)
        files = []
        if "int8" in self.precisions:
            files = calibration_files(self.calibration, [r["file"] for r in data.images])
        return Inputs(self, data, files)


@dataclass
class Inputs:
    """`Reduction` with its dataset and calibration images found."""

    wanted: Reduction
    data: Optional[CocoData]
    files: List[Path]
    single_ap: Optional[float] = None  # of the float32 graph, measured once

    def single(self, path) -> Optional[Dict]:
        """AP of the float32 graph in points of 100, for report.json; None without a dataset."""
        if self.data is None:
            return None
        if self.single_ap is None:
            self.single_ap = average_precision(path, self.data)
            print(f"AP on {len(self.data.images)} images of {self.data.name}: {self.single_ap:.2f}")
        return {"dataset": self.data.name, "images": len(self.data.images), "ap": self.single_ap}

    def loss(self, single, reduced, engine: str) -> ApLoss:
        """AP of both files, of the reduced one in an engine. There must be a dataset."""
        before = self.single(single)["ap"]
        ap = average_precision(reduced, self.data, engine)
        return ApLoss(self.data.name, len(self.data.images), before, ap)


def add_precision(
    precision: str,
    output: Path,
    student: Student,
    detector: ExportableDetector,
    spec: ModelSpec,
    inputs: Inputs,
    images: Optional[Sequence[np.ndarray]],
    engines: Sequence[str] = (),
) -> Dict:
    """Write model.<precision>.onnx and .json beside the verified model.onnx in `output`.

    Args:
        detector: from which model.onnx was made.  spec: of that.
        images, engines: to verify on and in, as in `verify`.
    Returns:
        What report.json says about it; "passed" False: it is kept as model.<precision>.failed.onnx.
    Raises:
        UserError, ParityError: it could not be made at all.
    """
    single = onnx.load(output / "model.onnx")
    hashes = {key: value for key, value in spec.hashes.items() if key != "graph_sha256"}
    spec = replace(spec, precision=precision, hashes=hashes)
    details: Dict = {}
    if precision == "fp16":
        model = half_model(detector, spec, single)
    else:
        recipe = inputs.wanted.recipe
        model = int8_model(single, spec, Reader(inputs.files, spec), recipe)
        details = {"recipe": recipe, "calibration": describe(inputs.files)}
    return {**_judge(model, output, student, spec, inputs, images, engines), **details}


def _judge(
    model, output: Path, student, spec: ModelSpec, inputs: Inputs, images, engines: Sequence[str]
) -> Dict:
    """Gate the graph under a temporary name, then give it the one it deserves."""
    content = model.SerializeToString(deterministic=True)
    spec.hashes["graph_sha256"] = hashlib.sha256(content).hexdigest()
    name = f"model.{spec.precision}"
    with unnamed(output / f"{name}.onnx", content) as temporary:
        measure = partial(inputs.loss, output / "model.onnx", temporary) if inputs.data else None
        drop = inputs.wanted.max_ap_drop
        report = verify_reduced(student.model, temporary, spec, images, measure, drop, engines)
        print(f"{spec.precision}: {report.table()}")
        if report.passed:
            spec.to_json(output / f"{name}.json", report.engines)
        final = output / (f"{name}.onnx" if report.passed else f"{name}.failed.onnx")
        os.replace(temporary, final)
        print(f"written: {final} ({len(content) / 1e6:.1f} MB)")
    return {
        "graph_sha256": spec.hashes["graph_sha256"],
        "bytes": len(content),
        "ap": report.loss.to_dict() if report.loss else None,
        "max_ap_drop": drop,
        "layers": _inventory(model),
        "verification": report.to_dict(),
    }


def _inventory(model: onnx.ModelProto) -> Dict:
    """Values of the weights by how they are stored, and the layers that stayed float32, and why."""
    layers = weighted_layers(model)
    values: Dict[str, int] = {}
    for layer in layers:
        values[layer.stored] = values.get(layer.stored, 0) + layer.values
    single = [layer for layer in layers if layer.stored == "fp32"]
    reasons = {layer.weight: layer.why_light() for layer in single}
    return {"values": values, "float": reasons}


def require_all_passed(details: Dict[str, Dict]) -> None:
    """ParityError naming each precision that was refused."""
    failed = [name for name, entry in details.items() if not entry["verification"]["passed"]]
    if failed:
        reasons = [
            f"{name}: {details[name]['verification']['verdict']}: "
            f"{details[name]['verification']['explanation']}"
            for name in failed
        ]
        raise ParityError(f"{'; '.join(reasons)}. Kept as model.{failed[0]}.failed.onnx")
