"""Every detector in short: a teacher, its distilled student, and the student's verified graph.

`make quick` runs it: for each pair of configs in configs/quick, about a minute of training each on
the drawn shapes, so the figures say that everything works and not how good it can get. A detector
fails when a command fails, a loss does not fall, an AP50 is not well above chance or the graph is
not shown to be the student. OUTPUT/quick.json and quick.md say how it went; exit code 1 if any
failed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Sequence

from tabulate import tabulate

from fgd.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "quick"
ITERATIONS = 200  # of teacher and student each; with 150 the slowest, RepPoints, has an AP50 of 6
LEAST_AP50 = 5.0  # percent; a hundred random boxes of the right sizes per image have 1.5
ROLES = ("teacher", "fgd")


class Failed(Exception):
    """Why a detector did not pass, in one line."""


def detectors() -> List[str]:
    """All that have a config of a distilled student."""
    return sorted(path.stem.split("_", 2)[2] for path in CONFIGS.glob("shapes_fgd_*.yaml"))


def run(log: Path, *words: object, python: str = sys.executable) -> None:
    """Run Python with these words, its output in ``log``; Failed if it fails."""
    command = [str(word) for word in words]
    with open(log, "a") as file:
        code = subprocess.run(
            [python, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        last = ([""] + log.read_text(errors="replace").strip().splitlines())[-1]
        name = command[command[0] == "-m"]
        raise Failed(f"{name}: exit code {code}, {last[:200]} (all of it: {log})")


def train(detector: str, role: str, output: Path) -> dict:
    """One run from its start; AP, AP50, falling losses and minutes.

    Raises:
        Failed: the command failed, a loss did not fall or an AP50 is too low.
    """
    folder = output / f"{role}_{detector}"
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier version left says nothing
    folder.mkdir(parents=True)
    options = ["OUTPUT_DIR", folder, "SOLVER.MAX_ITER", ITERATIONS, "SEED", 0]
    options += ["DATASETS.SHAPES.ROOT", output / "shapes"]
    if role == "fgd":
        teacher = output / f"teacher_{detector}" / "model_final.pth"
        # So short a training makes teachers that the doctor would refuse.
        options += ["MODEL.DISTILLER.TEACHER.WEIGHTS", teacher, "DOCTOR.MIN_AP50", LEAST_AP50]
    config = CONFIGS / f"shapes_{role}_{detector}.yaml"
    started = time.perf_counter()
    script = ROOT / "projects" / "FGD" / "train_net.py"
    run(folder / "console.txt", script, "--config-file", config, *options)
    minutes = (time.perf_counter() - started) / 60
    results = json.loads((folder / "results.json").read_text())
    lines = (folder / "metrics.json").read_text().splitlines()
    losses = loss_changes([json.loads(line) for line in lines])
    found = {"AP": metric(results, "AP"), "AP50": metric(results, "AP50")}
    check_run(role, losses, found["AP50"])
    return {"minutes": minutes, "losses": losses, **found}


def metric(results: dict, name: str) -> Dict[str, float]:
    """{"bbox": percent, and "segm" of those with masks}; 0 where nothing at all was detected."""
    return {task: results[task][name] or 0.0 for task in ("bbox", "segm") if task in results}


def loss_changes(metrics: Sequence[dict]) -> Dict[str, List[float]]:
    """First and last of the logged losses: all that classify and, if any, distillation's.

    Box and mask losses are left out. Those of a second stage are over proposals that match an
    object, so they rise while the first stage learns to propose, a cascade's most of all.

    Args:
        metrics: lines of metrics.json; each loss in them is a median over 20 iterations.
    """
    logged = [line for line in metrics if "total_loss" in line]
    changes: Dict[str, List[float]] = {}
    for line in (logged[0], logged[-1]):
        losses = {name: value for name, value in line.items() if name.startswith("loss_")}
        distilled = [value for name, value in losses.items() if name.startswith("loss_fgd_")]
        classifying = [value for name, value in losses.items() if "cls" in name]
        changes.setdefault("classification", []).append(sum(classifying))
        if distilled:
            changes.setdefault("distillation", []).append(sum(distilled))
    return changes


def check_run(role: str, losses: Dict[str, List[float]], ap50: Dict[str, float]) -> None:
    """Raise Failed unless losses fell, distillation's among them, and every AP50 is enough."""
    if ("distillation" in losses) != (role == "fgd"):
        raise Failed(f"{role}: its losses are {', '.join(losses)}")
    for name, (first, last) in losses.items():
        if not last < 0.95 * first:
            raise Failed(f"{role}: the {name} loss went from {first:.3g} to {last:.3g}")
    for task, value in ap50.items():
        if not value >= LEAST_AP50:
            raise Failed(f"{role}: {task} AP50 is {value:.1f}, below {LEAST_AP50}")


def export(detector: str, output: Path) -> dict:
    """Export the student, which verifies it; Failed if the graph is not the student."""
    folder = output / f"fgd_{detector}"
    script = ROOT / "deploy" / "export.py"
    run(folder / "export.txt", script, folder / "model_final.pth", "--force")
    report = json.loads((folder / "model_final_onnx" / "report.json").read_text())
    tally = report["verification"]["tally"]
    return {"matched": tally["matched"], "expected": tally["expected"]}


def check(detector: str, output: Path) -> dict:
    """All of one detector; its row, with "failed" set to the reason or None."""
    row = {"detector": detector, "failed": None}
    try:
        for role in ROLES:
            row[role] = train(detector, role, output)
        row["graph"] = export(detector, output)
    except Failed as reason:
        row["failed"] = str(reason)
    return row


def table(rows: Sequence[dict]) -> str:
    """The rows as Markdown; AP in percent."""
    cells = []
    for row in rows:
        line = [row["detector"]]
        for task in ("bbox", "segm"):
            line += [_number(row.get(role, {}).get("AP", {}).get(task), 1) for role in ROLES]
        graph = row.get("graph")
        line.append(f"{graph['matched']} of {graph['expected']}" if graph else "")
        line += [_number(row.get(role, {}).get("minutes"), 1) for role in ROLES]
        cells.append([*line, outcome(row)])
    headers = ["", "teacher, box AP", "student", "teacher, mask AP", "student"]
    headers += ["detections of the graph", "teacher, minutes", "student", ""]
    return tabulate(cells, headers, "github", disable_numparse=True)


def _number(value, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def outcome(row: dict) -> str:
    return row["failed"] or "passed"


def check_each(output: Path, name: str, heading: str, items, check, table, outcome) -> List[dict]:
    """Rows of all items, checked one after the other; the pages are written after each."""
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    rows: List[dict] = []
    for item in items:
        rows.append(check(item, output))
        print(f"{item}: {outcome(rows[-1])}", flush=True)
        write_pages(output, name, rows, f"# {heading}\n\n{table(rows)}\n")
    print(f"\n{table(rows)}\n\n{output / f'{name}.md'}")
    return rows


def write_pages(output: Path, name: str, rows: Sequence[dict], page: str) -> None:
    """NAME.json and NAME.md, each whole or not at all."""
    for suffix, text in ((".json", json.dumps(rows, indent=1)), (".md", page)):
        path = str(output / f"{name}{suffix}")
        atomic_write(path, lambda file, text=text: file.write(text.encode()))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python tools/quick.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "quick")
    parser.add_argument("--only", nargs="+", choices=detectors(), default=detectors())
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check the detectors one after the other; 1 if any failed."""
    args = build_parser().parse_args(argv)
    heading = f"Every detector, {ITERATIONS} iterations"
    rows = check_each(args.output, "quick", heading, args.only, check, table, outcome)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
