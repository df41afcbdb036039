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
from deploy.checks.oracle import Detectron2, RawJudge, as_tensors
from deploy.checks.verify_images import Batch, verification_batches
from deploy.checks.verify_report import ENOUGH, Tally, VerifyReport, decide, gates_of, together
from deploy.errors import ParityError
from deploy.graphs.common import ExportableDetector
from deploy.graphs.tensorrt.nms_rounds import Rounds
from deploy.runtime import engines_asked_for
from deploy.serving.progress import show_progress
from deploy.spec import ModelSpec, fills


def verify(
    model,
    onnx_path,
    spec: ModelSpec,
    images: Optional[Sequence[np.ndarray]] = None,
    engines: Sequence[str] = (),
) -> VerifyReport:
    """Compare a graph with Detectron2's inference and with the network in float64.

    Args:
        model: the Detectron2 student, with the score threshold that was exported.
        onnx_path: file written by `convert.to_onnx`.  spec: of it.
        images: more images to use, (h, w, 3) uint8, resized and ordered as the client does.
        engines: to run it in, each of which must pass; without any, those that are installed.
    Returns:
        The report. Detections are compared at the spec's score threshold and at a tenth of it,
        where many more decisions are taken; at 0 too when fewer than `ENOUGH` matched. The lower
        ones are set in the model and in a copy of the graph alike.
    Raises:
        UserError: an engine cannot load the file.
    """
    file, batches = onnx.load(onnx_path), verification_batches(spec, images)
    detectron2, judge = Detectron2(model, batches), RawJudge(model)
    return together(
        _verify_in(GraphUnderTest(file, str(onnx_path), engine), detectron2, judge, spec)
        for engine in engines_asked_for(engines)
    )


def _verify_in(
    graph: GraphUnderTest, detectron2: Detectron2, judge: RawJudge, spec: ModelSpec
) -> VerifyReport:
    tally, batches = Tally(), detectron2.batches
    compare(tally, detectron2, judge.single, graph, spec, spec.score_threshold)
    at_threshold = tally.expected
    compare(tally, detectron2, judge.single, graph, spec, spec.score_threshold / 10)
    if tally.matched < ENOUGH and not tally.unmatched:
        compare(tally, detectron2, judge.single, graph, spec, 0.0)
    rounds = Rounds()
    raw_errors, warnings = _raw_errors(judge, graph, batches, rounds)
    gates = gates_of(tally, raw_errors)
    broken = _broken(graph, batches, spec)
    verdict, explanation = decide(tally, gates, broken)
    count = sum(len(batch.images) for batch in batches)
    report = verdict, explanation, count, at_threshold, tally, gates, raw_errors, broken, warnings
    needed = rounds.needed if spec.target == "tensorrt" else None
    return VerifyReport(*report, nms_rounds=needed, engine=graph.session.engine)


def compare(
    tally: Tally,
    detectron2: Detectron2,
    detector: ExportableDetector,
    graph: GraphUnderTest,
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
    batches = detectron2.batches
    for done, (batch, found) in enumerate(zip(batches, detectron2.at(threshold)), 1):
        outputs, raw = graph.run(batch)
        broken = broken_shapes(outputs, batch, spec)
        if broken:
            raise ParityError(
                f"in {graph.session.engine}, {graph.name} gives what it never should: {broken[0]}"
            )
        cuts = detector.cut_scores(as_tensors(raw), torch.from_numpy(batch.image_sizes))
        for i, expected in enumerate(found):
            lines = Decisions(threshold, spec.nms_threshold, spec.max_detections, cuts[i])
            before = tally.unmatched
            tally.add(expected, detections(outputs, i), lines)
            if not fills(batch.image_sizes[i], batch.images.shape[2:], spec.size_divisibility):
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
