"""AP against latency: of what `deploy/benchmark.py` has timed beside the checkpoints of a study.

Nothing is timed here, where other runs may be busy. All students are one network, so that one
figure of PyTorch holds for all arms.
"""

import json
import shlex
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from detectron2.config import CfgNode

from fgd_inputs.json_file import number, read_json
from fgd_inputs.names import one_line

from ..errors import UserError
from ..weights import weights_sha256
from .arms import TEACHER
from .files import is_finished
from .run import Run

_BENCHMARK, _SPEC = "benchmark.json", "model.json"
_MACHINE = ("cpu", "threads", "providers")  # what has to be the same on one axis


class Timed(NamedTuple):
    """What one benchmark says.

    Attributes:
        machine: a text for all of `_MACHINE`. eager: ms of PyTorch, None where it was not timed.
        graphs: (name, ms, AP in percent) of graphs whose AP was measured with it.
        noisy: why its figures are not to be trusted; "" if nothing says so.
    """

    run: Run
    machine: str
    eager: Optional[float]
    graphs: List[Tuple[str, float, float]]
    noisy: str


def latency(runs: Sequence[Run], rows: Sequence[dict], cfg: CfgNode) -> Dict[str, Any]:
    """Points of the picture, and what is to be said of it.

    Args:
        rows: of `summarize`. cfg: the study's.
    Returns:
        {"points": [{"name", "kind": "PyTorch" or "graph", "ms", "AP"}], "text": sentences}.
    """
    timed, text = [], []
    for run in runs:
        path = exported(run) / _BENCHMARK
        if is_finished(run) and path.exists():
            try:
                timed.append(_read(run, path))
            except UserError as error:
                text.append(f"Left out: {error}")
    machines = [x.machine for x in timed]
    chosen = max(machines, key=machines.count, default="")
    text += [f"Left out: {x.run} was timed on {x.machine}" for x in timed if x.machine != chosen]
    timed = [x for x in timed if x.machine == chosen]
    text += [f"{x.run} was timed on a busy machine: {x.noisy}" for x in timed if x.noisy]
    points = _points(timed, rows)
    if points:
        said = (
            f"Median of one image, {chosen}, as deploy/benchmark.py timed it. All students are one "
            "network, so PyTorch takes as long for each. AP of a graph: as measured with it."
        )
        return {"points": points, "text": [said, *text]}
    return {"points": [], "text": [*_how_to(runs, cfg), *text]}


def exported(run: Run) -> Path:
    """Where `deploy/export.py` writes the graph of its checkpoint."""
    path = Path(run.weights)
    return path.with_name(f"{path.stem}_onnx")


def _how_to(runs: Sequence[Run], cfg: CfgNode) -> List[str]:
    run = next((x for x in reversed(runs) if is_finished(x) and x.arm != TEACHER), None)
    if run is None:
        return []
    timing = ["python", "deploy/benchmark.py", str(exported(run) / "model.onnx"), "--dataset"]
    timing += _test_set(run, cfg)
    return [
        f"Not timed. {shlex.join(['python', 'deploy/export.py', run.weights])} and then "
        f"{shlex.join(timing)} write what --report shows here."
    ]


def _test_set(run: Run, cfg: CfgNode) -> List[str]:
    """As deploy's options name it."""
    node = cfg.DATASETS
    drawn = sorted(Path(node.SHAPES.ROOT or run.folder / "shapes").glob("test-*/annotations.json"))
    name = node.JSON.TEST or (str(drawn[-1]) if drawn else ",".join(node.TEST))
    images = node.JSON.TEST and node.JSON.TEST_IMAGES
    return [name, *(["--images-root", images] if images else [])]


def _read(run: Run, path: Path) -> Timed:
    """UserError if it is no benchmark, or one of another checkpoint."""
    try:
        found = read_json(str(path), "benchmark")
        made_from = read_json(str(path.with_name(_SPEC)), "spec")["hashes"]["checkpoint_sha256"]
        if made_from != weights_sha256(run.weights):
            raise UserError(f"{path} is of another checkpoint than {run.weights}")
        measured = {**found["machine"], **found}
        machine = ", ".join(f"{key} {_text(measured[key])}" for key in _MACHINE)
        single = [row for row in found["rows"] if row["batch"] == 1]
        eager = [number(row["p50_ms"]) for row in single if row["kind"] == "eager"]
        ap = {x["name"]: number((x["ap"] or {}).get("AP")) for x in found["contenders"]}
        graphs = [(x["row"], number(x["p50_ms"])) for x in single if x["kind"] == "graph"]
        noisy = one_line(", ".join(found["noisy"]))
        known = [(name, ms, ap[name]) for name, ms in graphs if ms and ap[name] is not None]
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: not as deploy's commands leave it ({error!r})") from error
    return Timed(run, machine, next(iter(eager), None), known, noisy)


def _text(value: Any) -> str:
    return one_line(value if isinstance(value, str) else json.dumps(value))


def _points(timed: Sequence[Timed], rows: Sequence[dict]) -> List[dict]:
    points = []
    for teaches in (False, True):
        own = [x for x in timed if (x.run.arm == TEACHER) == teaches]
        eager = [x.eager for x in own if x.eager]
        for row in rows if eager else ():
            ap = row.get("bbox", {}).get("AP", {}).get("mean")
            if (row["arm"] == TEACHER) == teaches and ap is not None:
                point = {"name": row["arm"], "kind": "PyTorch", "ms": median(eager), "AP": ap}
                points.append(point)
        points += [
            {"name": f"{x.run}, {name}", "kind": "graph", "ms": ms, "AP": ap}
            for x in own
            for name, ms, ap in x.graphs
        ]
    return points
