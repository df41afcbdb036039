"""One benchmark: every contender measured alone, then all of them timed in alternation.

Needs numpy, Pillow, the engines and onnx; Detectron2 only where a checkpoint is compared.
"""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnx

from deploy.coco_data import CocoData
from deploy.errors import UserError
from deploy.evaluate import evaluate_eager, evaluate_graph
from deploy.reduced.layers import check_precision
from deploy.runtime import GraphDetector
from deploy.serving.engine import ENGINES
from deploy.speed.bench_rows import (
    BASELINES,
    CLIENT,
    EAGER,
    GRAPH,
    LEGACY,
    NETWORK,
    SCRIPT,
    ClientRunner,
    Contender,
    NetworkRunner,
    Runner,
    short_names,
)
from deploy.speed.footprint import load, measure_alone, reason
from deploy.speed.timing import describe_machine, interleave, noise


@dataclass
class Settings:
    """How to measure: see the options of the command.

    baselines: keys of `BASELINES` to run where there is a checkpoint. required: the same, where one
    that cannot run is an error and not a remark.
    """

    batch_sizes: Sequence[int] = (1, 4, 8)
    threads: int = 1
    repeats: int = 20
    warmup: int = 3
    provider: str = "cpu"
    baselines: Sequence[str] = tuple(BASELINES)
    required: bool = False


@dataclass
class _Row:
    """A line of the report and what is behind it."""

    name: str
    kind: str
    runner: Runner


@dataclass
class _Run:
    """What is known so far."""

    settings: Settings
    images: Sequence[np.ndarray]
    rows: List[_Row] = field(default_factory=list)
    contenders: List[Dict[str, Any]] = field(default_factory=list)
    left_out: List[Dict[str, str]] = field(default_factory=list)

    def fill(self, count: int) -> List[np.ndarray]:
        """`count` images, the given ones in turn."""
        return [self.images[i % len(self.images)] for i in range(count)]


def benchmark(
    detectors: Sequence[GraphDetector],
    images: Sequence[np.ndarray],
    checkpoint=None,
    settings: Optional[Settings] = None,
    data: Optional[CocoData] = None,
) -> Dict[str, Any]:
    """Measure graphs, and the student they were exported from.

    Args:
        detectors: at least one, made with the provider and threads of the settings; each graph in
            each of the engines.
        images: (H, W, 3) uint8 BGR; used in turn to fill the batches.
        checkpoint: of the first graph's student, for the baselines; None leaves those out.
        data: measure AP on it, of the graphs and of Detectron2 eager.
    Returns:
        What benchmark.json holds: "contenders", each with its file and footprint (`measure_alone`);
        "rows", each with its kind, batch size, `Timing.summary`, detections "found" in the batch,
        and its p50 over that of Detectron2 eager, "to_eager" (None without), and over that of the
        first graph, "to_first"; "left_out": rows that could not run, with the reason; "noisy":
        reasons to distrust the figures.
    Raises:
        UserError: a required baseline cannot run; the dataset has other classes.
    """
    machine = describe_machine()  # before our own load
    run = _Run(settings or Settings(), images)
    for detector in detectors if data else ():
        data.category_ids(detector.spec.classes)
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint:
            for kind in run.settings.baselines:
                _add_baseline(run, kind, checkpoint, detectors[0], folder)
        for detector, name in zip(detectors, _names(detectors), strict=True):
            _add_graph(run, detector, name)
        rows, timings = _time(run)
    providers = detectors[0].session.providers
    threads = run.settings.threads
    return {
        "machine": machine,
        "providers": providers,
        "threads": threads,
        "warmup": run.settings.warmup,
        "repeats": run.settings.repeats,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "dataset": {"name": data.name, "images": len(data.images)} if data else None,
        "contenders": _with_ap(run, data),
        "rows": rows,
        "left_out": run.left_out,
        "noisy": noise(timings, machine["load_average"], threads, on_cpu=len(providers) == 1),
    }


def _names(detectors: Sequence[GraphDetector]) -> List[str]:
    """What to call them: by their files, and by the engine where that is not ONNX Runtime."""
    engines = [detector.session.engine.name for detector in detectors]
    paths = [d.path for d, engine in zip(detectors, engines) if engine == engines[0]]
    short = dict(zip(paths, short_names(paths), strict=True))
    return [
        short[detector.path] + ("" if engine == "onnxruntime" else f", {ENGINES[engine]}")
        for detector, engine in zip(detectors, engines)
    ]


def _add_graph(run: _Run, detector: GraphDetector, name: str) -> None:
    check_precision(onnx.load(detector.path), detector.spec.precision, str(detector.path))
    engine, precision = detector.session.engine, detector.spec.precision
    contender = Contender(name, GRAPH, detector.path, detector.spec, engine.name)
    facts = {"graph_sha256": detector.sha256, "precision": precision, "engine": str(engine)}
    runner = _enter(run, contender, **facts)
    cut = NetworkRunner(detector, run.settings.threads)
    run.rows += [
        _Row(name, GRAPH, runner),
        _Row(f"{name}, network only", NETWORK, cut),
        _Row(f"{name}, from image", CLIENT, ClientRunner(detector)),
    ]


def _add_baseline(run: _Run, kind: str, checkpoint, first: GraphDetector, folder) -> None:
    try:
        path = Path(checkpoint)
        if kind in (SCRIPT, LEGACY):
            from deploy.speed.baselines import trace  # imports PyTorch

            provider = run.settings.provider
            path = trace(kind, path, first.spec, run.images[0], folder, provider)
        contender = Contender(BASELINES[kind], kind, path, first.spec)
        run.rows.append(_Row(contender.name, kind, _enter(run, contender)))
    except Exception as error:
        # a checkpoint that is none of ours makes every row impossible; the rest is a remark
        if run.settings.required or (isinstance(error, UserError) and kind == EAGER):
            raise UserError(f"{BASELINES[kind]} cannot run: {reason(error)}") from error
        run.left_out.append({"row": BASELINES[kind], "reason": reason(error)})


def _enter(run: _Run, contender: Contender, **facts) -> Runner:
    """Measure a contender alone, then load it here too."""
    provider, threads = run.settings.provider, run.settings.threads
    most = run.fill(max(run.settings.batch_sizes))
    footprint = measure_alone(contender, provider, threads, most)
    if "error" in footprint:
        raise UserError(footprint["error"])
    runner = load(contender, provider, threads)
    facts |= {"file": str(contender.path)} if contender.kind == GRAPH else {}
    size = contender.path.stat().st_size / 2**20
    run.contenders.append(
        {"name": contender.name, "kind": contender.kind, **facts, "file_mib": size, **footprint}
    )
    if contender.path.suffix == ".onnx":
        run.contenders[-1]["nodes"] = len(onnx.load(contender.path).graph.node)
    return runner


def _time(run: _Run) -> Tuple[List[Dict[str, Any]], Dict[str, Any]]:
    """The report's rows, and all timings by a name to show."""
    rows, timings, settings = [], {}, run.settings
    for batch in settings.batch_sizes:
        images = run.fill(batch)
        able = [row for row in run.rows if batch <= (row.runner.max_batch or batch)]
        calls = {row.name: row.runner.call(images) for row in able}
        found = {row.name: row.runner.count(calls[row.name]()) for row in able}
        measured = interleave(calls, settings.repeats, settings.warmup) if calls else {}
        p50 = {row.kind: np.median(measured[row.name].wall) for row in reversed(able)}
        for row in able:
            timing, summary = measured[row.name], measured[row.name].summary(batch)
            references = {"to_eager": p50.get(EAGER), "to_first": p50.get(GRAPH)}
            ratios = {k: v and float(np.median(timing.wall) / v) for k, v in references.items()}
            facts = {"row": row.name, "kind": row.kind, "batch": batch, "found": found[row.name]}
            rows.append({**facts, **summary, **ratios})
            timings[f"{row.name}, batch {batch}"] = timing
    for row in run.rows:
        most = row.runner.max_batch
        if most and most < max(settings.batch_sizes):
            why = f"made for batches of {most}: larger ones are left out"
            run.left_out.append({"row": row.name, "reason": why})
    return rows, timings


def _with_ap(run: _Run, data: Optional[CocoData]) -> List[Dict[str, Any]]:
    """The contenders, with "ap": the metrics where they were measured, else None."""
    metrics: Dict[str, Dict[str, Any]] = {}
    for row in run.rows if data else ():
        if row.kind == GRAPH:
            metrics[row.name] = evaluate_graph(row.runner.detector, data)[0]
        elif row.kind == EAGER:
            metrics[row.name] = evaluate_eager(row.runner.eager, data)
    chosen = {name: _chosen(found) for name, found in metrics.items()}
    return [{**contender, "ap": chosen.get(contender["name"])} for contender in run.contenders]


def _chosen(metrics: Dict[str, Any]) -> Dict[str, Optional[float]]:
    """AP and AP50, of masks too if there are any; None where there was nothing to find."""
    values = {"AP": metrics["AP"], "AP50": metrics["AP50"]}
    if "masks" in metrics:
        values["mask AP"] = metrics["masks"]["AP"]
    return {name: None if math.isnan(value) else value for name, value in values.items()}
