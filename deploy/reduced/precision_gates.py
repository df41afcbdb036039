"""What a float16 or int8 graph must keep: the spec, the detections (fp16), and its AP."""

from dataclasses import asdict, dataclass
from typing import Callable, Dict, Optional, Sequence

import numpy as np
import onnx

from deploy.checks.graph_under_test import (
    GraphUnderTest,
    broken_by_nan,
    broken_promises,
    broken_target,
)
from deploy.checks.matching import Decisions, Found, match_detections
from deploy.checks.oracle import Detectron2
from deploy.checks.verification import compare
from deploy.checks.verify_images import verification_batches
from deploy.checks.verify_report import ENOUGH, Gate, Tally, VerifyReport, together
from deploy.coco_data import CocoData
from deploy.evaluate import evaluate_graph
from deploy.graphs import exportable
from deploy.reduced.layers import check_precision
from deploy.runtime import engines_asked_for, load
from deploy.spec import ModelSpec

CLOSE = 0.99  # of Detectron2's detections, that float16 finds within these bounds:
BOX_PIXELS, SCORE, MASK = 0.5, 5e-3, 2e-2
HALF_AP_DROP = 0.2  # points; int8 has the user's bound
_KEPT = "within its gates"


@dataclass
class HalfTally(Tally):
    """Counts pairs that are matched, but not close: NMS kept a neighbour of nearly equal score."""

    far: int = 0

    def add(self, expected: Found, actual: Found, lines: Decisions) -> None:
        """Count the detections of one more image."""
        super().add(expected, actual, lines)
        for i, j in match_detections(expected, actual).pairs:
            far = np.abs(expected.boxes[i] - actual.boxes[j]).max() > BOX_PIXELS
            far |= abs(expected.scores[i] - actual.scores[j]) > SCORE
            if expected.masks is not None:
                far |= np.abs(expected.masks[i] - actual.masks[j]).max() > MASK
            self.far += int(far)

    @property
    def close(self) -> float:
        """Share of close pairs among the detections that nothing excuses; 1 if there are none."""
        return (self.matched - self.far) / max(self.matched + self.unmatched, 1)


@dataclass
class ApLoss:
    """COCO AP in points of 100, of the float32 graph in the first engine and of this one in any, on
    the same images."""

    dataset: str
    images: int
    single: float
    reduced: float

    @property
    def points(self) -> float:
        """What is lost; negative where the rounding happened to help."""
        return self.single - self.reduced

    def to_dict(self) -> Dict:
        """For report.json, the loss in points and relative to float32 included."""
        relative = self.points / self.single if self.single else None
        return {**asdict(self), "loss_points": self.points, "loss_relative": relative}

    def text(self) -> str:
        """One line."""
        return (
            f"AP on {self.images} images of {self.dataset}: {self.reduced:.2f}, float32 "
            f"{self.single:.2f}, loss {self.points:+.2f} points ({self.points / self.single:+.1%})"
            if self.single
            else f"AP on {self.images} images of {self.dataset}: 0 in float32"
        )


@dataclass
class ReducedReport(VerifyReport):
    """As `VerifyReport`; the verdict of a graph that passed is "within its gates"."""

    loss: Optional[ApLoss] = None

    @property
    def passed(self) -> bool:
        return self.verdict == _KEPT


def average_precision(path, data: CocoData, engine: str = "onnxruntime") -> float:
    """AP in points of a graph, as the evaluate command measures it; 0 where it is undefined."""
    return float(np.nan_to_num(evaluate_graph(load(path, engine), data)[0]["AP"]))


def verify_reduced(
    model,
    onnx_path,
    spec: ModelSpec,
    images: Optional[Sequence[np.ndarray]],
    measure: Optional[Callable[[str], ApLoss]],
    max_ap_drop: float,
    engines: Sequence[str] = (),
) -> ReducedReport:
    """Judge a graph of less precision.

    Args:
        model, onnx_path, spec, images, engines: as `verification.verify`; `spec.precision` is what
            is claimed.
        measure: the loss of AP in an engine; None only for float16, whose detections are then
            matched alone.
        max_ap_drop: points, for what it measures.
    Raises:
        UserError: the graph has not the precision it claims, or does not load.
    """
    file = onnx.load(onnx_path)
    check_precision(file, spec.precision, str(onnx_path))
    detectron2 = Detectron2(model, verification_batches(spec, images))
    return together(
        _verify_in(
            GraphUnderTest(file, str(onnx_path), engine, spec.precision),
            detectron2,
            spec,
            measure(engine) if measure else None,
            max_ap_drop,
        )
        for engine in engines_asked_for(engines)
    )


def _verify_in(
    graph: GraphUnderTest,
    detectron2: Detectron2,
    spec: ModelSpec,
    loss: Optional[ApLoss],
    max_ap_drop: float,
) -> ReducedReport:
    half, batches = spec.precision == "fp16", detectron2.batches
    tally, detector = HalfTally() if half else Tally(), exportable(detectron2.model)
    compare(tally, detectron2, detector, graph, spec, spec.score_threshold)
    broken = [
        text for batch in batches for text in broken_promises(graph.run(batch)[0], batch, spec)
    ]
    if half and spec.input_dtype == "float32":  # QuantizeLinear has no NaN
        broken += broken_by_nan(graph, batches[0])
    broken += broken_target(graph, spec)
    gates = []
    if half:
        name = f"within {BOX_PIXELS} px and {SCORE} of score"
        gates.append(Gate(name, tally.close, f">= {CLOSE}", tally.close >= CLOSE))
    if loss is not None:
        bound = min(HALF_AP_DROP, max_ap_drop) if half else max_ap_drop
        gates.append(Gate("AP loss (points)", loss.points, f"<= {bound:g}", loss.points <= bound))
    verdict, explanation = _decide(tally if half else None, gates, broken, loss, max_ap_drop)
    count = sum(len(batch.images) for batch in batches)
    report = verdict, explanation, count, tally.expected, tally, gates, {}, broken, []
    return ReducedReport(*report, engine=graph.session.engine, loss=loss)


def _decide(tally, gates, broken, loss, max_ap_drop):
    """(verdict, explanation); `tally` None where matching proves nothing."""
    failed = [gate.name for gate in gates if not gate.kept]
    if broken:
        return "promise broken", broken[0]
    if loss is not None and loss.single <= max_ap_drop:
        return "vacuous", (
            f"the float32 graph has AP {loss.single:.2f} on {loss.dataset}: it cannot lose "
            f"{max_ap_drop:g} points. Is this the model's dataset?"
        )
    if failed:
        example = f"; {tally.examples[0]}" if tally is not None and tally.examples else ""
        return "too much is lost", f"over the gate: {', '.join(failed)}{example}"
    if loss is None and tally.matched < ENOUGH:
        return "vacuous", (
            f"{tally.matched} detections matched: too few to prove anything. Give images of the "
            "model's objects with --images, or --dataset"
        )
    return _KEPT, loss.text() if loss is not None else "the detections are Detectron2's"
