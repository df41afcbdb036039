"""What a verification found, its gates, and the verdict."""

from dataclasses import asdict, dataclass, field, replace
from typing import Dict, Iterable, List, Optional, Tuple

import numpy as np

from deploy.checks.matching import MARGIN, Decisions, Found, excuse, match_detections
from deploy.graphs.common import FEATURES
from deploy.graphs.tensorrt.nms_rounds import ROUNDS
from deploy.serving.engine import Engine

MATCHED, BOX_PIXELS, SCORE, MASK = 0.995, 0.01, 1e-4, 1e-3  # gates for float32
RAW_RATIO = 2.0  # the graph's error to float64, as a multiple of torch's
ENOUGH = 20  # matched detections without which nothing was shown
_NOISE = 10  # times a gate; on chaotic weights float noise alone reached 4 times, in torch as well
# Roundings of the largest value that are never held against the graph. On flat image areas the
# terms of a sum have one sign: ONNX Runtime was seen to lose 42 there, with any graph, and torch 4.
_ROUNDINGS = 128
_OTHER_AVERAGES = (
    ". Images that fill the canvas agree: some layer looks at the whole map, padding included, by "
    "other means than group norm and squeeze-and-excitation; if all your images fill it, give "
    "--filled"
)


@dataclass
class Tally:
    """Comparison with Detectron2 over all images and score thresholds."""

    thresholds: List[float] = field(default_factory=list)
    expected: int = 0  # Detectron2's detections
    matched: int = 0
    excused: int = 0  # unmatched ones within rounding of a decision
    unmatched: int = 0  # the others, of either side
    padded: int = 0  # of the unmatched, those in images that do not fill the canvas
    examples: List[str] = field(default_factory=list)  # the first few of the last two kinds
    box_error: float = 0.0  # pixels, largest over matched detections
    score_error: float = 0.0
    mask_error: Optional[float] = None  # probability; None without masks
    lowest: float = 1.0  # of Detectron2's scores
    highest: float = 0.0

    @property
    def ratio(self) -> float:
        """Matched share of the detections that nothing excuses; 1 if there are none."""
        return self.matched / max(self.matched + self.unmatched, 1)

    def add(self, expected: Found, actual: Found, lines: Decisions) -> None:
        """Count the detections of one more image."""
        matching = match_detections(expected, actual)
        self.expected += len(expected.scores)
        self.matched += len(matching.pairs)
        self.lowest = min([self.lowest, *expected.scores.tolist()])
        self.highest = max([self.highest, *expected.scores.tolist()])
        for i, j in matching.pairs:
            box_error = float(np.abs(expected.boxes[i] - actual.boxes[j]).max())
            self.box_error = max(self.box_error, box_error)
            score_error = abs(float(expected.scores[i]) - float(actual.scores[j]))
            self.score_error = max(self.score_error, score_error)
            if expected.masks is not None:
                mask_error = float(np.abs(expected.masks[i] - actual.masks[j]).max())
                self.mask_error = max(self.mask_error or 0.0, mask_error)
        for side, row, excused in excuse(matching, expected, actual, lines):
            own = expected if side == "missing" else actual
            self.excused += excused
            self.unmatched += not excused
            if len(self.examples) < 5:
                self.examples.append(
                    f"{side}: class {own.labels[row]}, score {own.scores[row]:.4f}, box "
                    f"{own.boxes[row].round(1).tolist()}{', excused' if excused else ''}"
                )


@dataclass
class Gate:
    """One figure and the bound it must keep."""

    name: str
    value: float
    bound: str
    kept: bool


@dataclass
class VerifyReport:
    """Verdict, and what it rests on. `verdict` is "equal", or says what is wrong."""

    verdict: str
    explanation: str
    images: int
    at_threshold: int  # of Detectron2's detections, those at the threshold of the spec
    tally: Tally
    gates: List[Gate]
    raw_errors: Dict[str, Dict[str, float]]  # name -> largest error of "graph" and "torch", "scale"
    broken: List[str]  # what the spec promises
    warnings: List[str]
    nms_rounds: Optional[int] = None  # of static NMS that the images needed; None without
    engine: Optional[Engine] = None  # that ran the graph
    others: List["VerifyReport"] = field(default_factory=list)  # in which other engines passed

    @property
    def passed(self) -> bool:
        return self.verdict == "equal"

    def to_dict(self) -> Dict:
        """For report.json; NaN and infinity, which JSON lacks, as text."""
        others = [report.to_dict() for report in self.others]
        return _json_ready({"passed": self.passed, **asdict(self), "others": others})

    @property
    def engines(self) -> List[Engine]:
        """All in which the graph was run."""
        return [self.engine, *(report.engine for report in self.others)]

    def table(self) -> str:
        """Text: what was compared, one row per gate, then the verdict; of each engine."""
        tally, thresholds = self.tally, ", ".join(f"{t:g}" for t in self.tally.thresholds)
        lines = [report.table() for report in self.others] + [
            f"{self.engine}: {self.images} images, {self.at_threshold} detections; at score "
            f"thresholds {thresholds} together {tally.expected}: "
            f"{tally.matched} matched, {tally.excused} unmatched within rounding of a decision, "
            f"{tally.unmatched} unmatched"
        ]
        for gate in self.gates:
            outcome = "ok" if gate.kept else "FAIL"
            lines.append(f"  {gate.name:36} {gate.value:<10.3g} {gate.bound:10} {outcome}")
        if self.nms_rounds is not None:
            lines.append(f"  rounds of static NMS that were needed {self.nms_rounds} of {ROUNDS}")
        lines += [*self.broken[:5], *self.warnings, f"{self.verdict}: {self.explanation}"]
        return "\n".join(lines)


def together(reports: Iterable[VerifyReport]) -> VerifyReport:
    """One report of one graph in several engines: the first that did not pass, else the first.

    Engines behind one that did not pass are not tried.
    """
    passed = []
    for report in reports:
        if not report.passed:
            report.explanation = f"in {report.engine}, {report.explanation}"
            return replace(report, others=passed)
        passed.append(report)
    first, *others = passed
    names = [str(report.engine) for report in passed]
    where = " and ".join(names) if others else f"one engine, {names[0]}"
    return replace(first, explanation=f"{first.explanation}, in {where}", others=others)


def _json_ready(value):
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_ready(item) for item in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def gates_of(tally: Tally, raw_errors: Dict[str, Dict[str, float]]) -> List[Gate]:
    """Matched share, box, score and mask error, and each raw prediction's error to float64.

    Features have no gate of their own: what is wrong with them shows in the predictions.
    """
    gates = [
        Gate("matched", tally.ratio, f">= {MATCHED}", tally.ratio >= MATCHED),
        Gate(
            "box error (pixels)", tally.box_error, f"<= {BOX_PIXELS}", tally.box_error <= BOX_PIXELS
        ),
        Gate("score error", tally.score_error, f"<= {SCORE}", tally.score_error <= SCORE),
    ]
    if tally.mask_error is not None:
        gates.append(Gate("mask error", tally.mask_error, f"<= {MASK}", tally.mask_error <= MASK))
    for name, errors in raw_errors.items():
        if name.startswith(FEATURES):
            continue
        rounding = _ROUNDINGS * np.finfo(np.float32).eps * errors["scale"]
        bound = float(max(RAW_RATIO * errors["torch"], rounding))
        kept = bool(errors["graph"] <= bound)  # False for NaN
        gates.append(Gate(f"{name} to float64", errors["graph"], f"<= {bound:.2g}", kept))
    return gates


def decide(tally: Tally, gates: List[Gate], broken: List[str]) -> Tuple[str, str]:
    """(verdict, explanation) of `VerifyReport`."""
    failed = [gate.name for gate in gates if not gate.kept]
    if broken:
        return "promise broken", broken[0]
    if tally.highest - tally.lowest <= MARGIN:
        return "vacuous", (
            f"all {tally.expected} scores lie within {MARGIN} of each other, so nothing could be "
            "told apart. Is the model trained? Give images of its objects with --images"
        )
    if not tally.unmatched and tally.matched < max(ENOUGH, tally.excused):
        return "vacuous", (
            f"{tally.matched} of {tally.expected} detections matched, {tally.excused} undecided, "
            f"down to score {tally.thresholds[-1]:g}: too few to prove anything. Give images of "
            "the model's objects with --images"
        )
    if not failed:
        return "equal", "the graph gives Detectron2's detections"
    noise = (
        tally.box_error <= _NOISE * BOX_PIXELS
        and tally.score_error <= _NOISE * SCORE
        and (tally.mask_error or 0.0) <= _NOISE * MASK
    )
    if noise and set(failed) <= {"box error (pixels)", "score error", "mask error"}:
        return "ill-conditioned weights", (
            f"over the gate: {', '.join(failed)}. Not the graph's fault: its raw predictions are "
            "as close to float64 as PyTorch's, but the weights amplify rounding"
        )
    example = f"; {tally.examples[0]}" if tally.examples else ""
    hint = _OTHER_AVERAGES if 0 < tally.unmatched == tally.padded else ""
    return "the graph differs", f"over the gate: {', '.join(failed)}{example}{hint}"
