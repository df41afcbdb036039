"""Proof that an exported graph equals the model: run with every export, and never on nothing."""

from typing import Dict, List, Optional, Sequence

import numpy as np
import onnx
import torch

from deploy.checks.graph_under_test import (
    GraphUnderTest,
    broken_by_nan,
    broken_promises,
    broken_shapes,
    broken_target,
    detections,
)
from deploy.checks.matching import Decisions
from deploy.checks.oracle import RawJudge, as_tensors, detectron2_detections, score_threshold
from deploy.checks.verify_images import Batch, verification_batches
from deploy.checks.verify_report import ENOUGH, Tally, VerifyReport, decide, gates_of
from deploy.errors import ParityError
from deploy.graphs import exportable_class
from deploy.graphs.common import ExportableDetector
from deploy.graphs.tensorrt.nms_rounds import Rounds
from deploy.serving.progress import show_progress
from deploy.spec import ModelSpec, fills


def verify(
    model, onnx_path, spec: ModelSpec, images: Optional[Sequence[np.ndarray]] = None
) -> VerifyReport:
    """Compare a graph with Detectron2's inference and with the network in float64.

    Args:
        model: the Detectron2 student, with the score threshold that was exported.
        onnx_path: file written by `convert.to_onnx`.  spec: of it.
        images: more images to use, (h, w, 3) uint8, resized and ordered as the client does.
    Returns:
        The report. Detections are compared at the spec's score threshold and at a tenth of it,
        where many more decisions are taken; at 0 too when fewer than `ENOUGH` matched. The lower
        ones are set in the model and in a copy of the graph alike.
    Raises:
        UserError: ONNX Runtime cannot load the file.
    """
    graph = GraphUnderTest(onnx.load(onnx_path), str(onnx_path))
    batches = verification_batches(spec, images)
    tally, judge = Tally(), RawJudge(model)
    pair = model, judge.single, graph
    compare(tally, *pair, batches, spec, spec.score_threshold)
    at_threshold = tally.expected
    compare(tally, *pair, batches, spec, spec.score_threshold / 10)
    if tally.matched < ENOUGH and not tally.unmatched:
        compare(tally, *pair, batches, spec, 0.0)
    rounds = Rounds()
    raw_errors, warnings = _raw_errors(judge, graph, batches, rounds)
    gates = gates_of(tally, raw_errors)
    broken = _broken(graph, batches, spec)
    verdict, explanation = decide(tally, gates, broken)
    count = sum(len(batch.images) for batch in batches)
    report = VerifyReport(
        verdict, explanation, count, at_threshold, tally, gates, raw_errors, broken, warnings
    )
    if spec.target == "tensorrt":
        report.nms_rounds = rounds.needed
    return report


def compare(
    tally: Tally,
    model,
    detector: ExportableDetector,
    graph: GraphUnderTest,
    batches: Sequence[Batch],
    spec: ModelSpec,
    threshold: float,
) -> None:
    """Add to the tally what both find at a score threshold; the file's own is not replaced.

    Args:
        detector: `exportable(model)`, which knows where candidates are cut.
    """
    if threshold != spec.score_threshold:
        graph = graph.with_threshold(threshold)
    tally.thresholds.append(threshold)
    with score_threshold(model, exportable_class(model).threshold_path, threshold):
        for done, batch in enumerate(batches, 1):
            outputs, raw = graph.run(batch)
            broken = broken_shapes(outputs, batch, spec)
            if broken:
                raise ParityError(f"{graph.name} gives what it never should: {broken[0]}")
            cuts = detector.cut_scores(as_tensors(raw), torch.from_numpy(batch.image_sizes))
            for i, expected in enumerate(detectron2_detections(model, batch)):
                lines = Decisions(threshold, spec.nms_threshold, spec.max_detections, cuts[i])
                before = tally.unmatched
                tally.add(expected, detections(outputs, i), lines)
                canvas = batch.images.shape[2:]
                if not fills(batch.image_sizes[i], canvas, spec.size_divisibility):
                    tally.padded += tally.unmatched - before
            show_progress(done, len(batches), f"batches at score threshold {threshold:g}")


def _broken(graph: GraphUnderTest, batches: Sequence[Batch], spec: ModelSpec) -> List[str]:
    broken = []
    if graph.threshold != np.float32(spec.score_threshold):
        broken.append(f"the graph's score threshold is {graph.threshold}")
    for batch in batches:
        broken += broken_promises(graph.run(batch)[0], batch, spec)
    if spec.input_dtype == "float32":
        broken += broken_by_nan(graph, max(batches, key=lambda batch: len(batch.images)))
    return broken + broken_target(graph, spec)


def _raw_errors(judge: RawJudge, graph: GraphUnderTest, batches: Sequence[Batch], rounds: Rounds):
    """Largest raw errors by name, and warnings. In float64 the first and the last batch do."""
    worst: Dict[str, Dict[str, float]] = {}
    warnings = []
    for i, batch in enumerate(batches):
        outputs, raw = graph.run(batch)
        cut = judge.cut_images(raw, outputs["num_dets"])
        if cut:
            warnings.append(f"batch {i}: more candidates than the graph keeps in {cut} images")
        rounds.add(raw, outputs["num_dets"], judge.single.max_detections)
        if i not in (0, len(batches) - 1):
            continue
        for name, errors in judge.errors(batch, {**raw, **outputs}).items():
            known = worst.setdefault(name, errors)
            worst[name] = {key: max(known[key], value) for key, value in errors.items()}
        show_progress(i + 1, len(batches), "batches, raw predictions")
    return worst, warnings + rounds.warnings()
