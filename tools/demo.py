"""The whole way on generated pictures: teacher, students, ONNX, verification, AP, latency.

`make demo` runs it. Every step is a command that a user could type, and is printed; the result is
OUTPUT/README.md with one table, and pictures beside it.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from deploy.coco_data import CocoData, load_dataset
from deploy.eager import EagerDetector
from deploy.runtime import GraphDetector
from deploy.serving.draw import draw_detections
from deploy.serving.engine import ENGINES, installed
from deploy.serving.preprocess import load_image

ROOT = Path(__file__).resolve().parents[1]
ARMS = {  # arm of fgd.study -> name in the table
    "teacher": "teacher",
    "student": "student alone",
    "inherit": "student, inheriting",
    "inherit+distil": "student, FGD",
}


def command(*words: object) -> None:
    """Print a command as it would be typed, run it, and stop the demo if it fails."""
    words = [str(word) for word in words]
    print(f"\n$ {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, *words[1:]], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


def train(output: Path, config: str, teacher: str, seed: int) -> None:
    command(
        *("python", "-m", "fgd.study", "--config-file", config, "--teacher", teacher),
        *("--arms", ",".join(arm for arm in ARMS if arm != "teacher")),
        *("--seeds", seed, "--jobs", 2, "--output", output),
        *("DATASETS.SHAPES.ROOT", output / "shapes"),
    )


def start(output: Path, train_json: Path, test_json: Path) -> None:
    """What fgd.start makes of the same pictures: its configs are timed, and not trained."""
    folder = output / "start"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo, which it would not overwrite
    command(
        *("python", "-m", "fgd.start", "--train", train_json, "--test", test_json),
        *("--budget", 10, "--output", folder),
    )


def export_and_measure(folder: Path, test_json: Path) -> Dict[str, dict]:
    """Export, evaluate and time the checkpoint of one run; what the commands reported."""
    checkpoint, exported = folder / "model_final.pth", folder / "model_final_onnx"
    command("python", "deploy/export.py", checkpoint, "--force")
    graph, ap = exported / "model.onnx", exported / "evaluate.json"
    command(
        *("python", "deploy/evaluate.py", graph, "--dataset", test_json),
        *("--checkpoint", checkpoint, "--output", ap),
    )
    command(
        *("python", "deploy/benchmark.py", graph, "--baselines", "eager"),
        *("--batch-sizes", 1, "--threads", 1),
        *(word for engine in installed() for word in ("--engine", engine)),
    )
    reports = {"evaluate": ap, "benchmark": exported / "benchmark.json"}
    return {name: json.loads(path.read_text()) for name, path in reports.items()}


def rows(output: Path, seed: int, deployed: Dict[str, Dict[str, dict]]) -> List[list]:
    """One row per arm: AP and AP50 in PyTorch; of exported ones AP, latency and size too."""
    table = []
    for arm, name in ARMS.items():
        folder = run_folder(output, arm, seed)
        box = json.loads((folder / "results.json").read_text())["bbox"]
        cells = [name, f"{box['AP']:.1f}", f"{box['AP50']:.1f}"]
        if arm in deployed:
            report = deployed[arm]["benchmark"]
            p50 = {row["row"]: row["p50_ms"] for row in report["rows"]}
            # the graph in ONNX Runtime, in OpenVINO where that is installed, and Detectron2
            timed = sorted(report["contenders"], key=lambda contender: contender["kind"] == "eager")
            cells += [
                f"{deployed[arm]['evaluate']['metrics']['AP']['onnx']:.1f}",
                *(f"{p50[contender['name']]:.1f}" for contender in timed),
                f"{timed[0]['file_mib']:.1f}",
            ]
        table.append(cells)
    return table


def run_folder(output: Path, arm: str, seed: int) -> Path:
    return output / (arm if arm == "teacher" else f"{arm}_{seed}")


def draw_comparison(output: Path, seed: int, data: CocoData, count: int = 4) -> Path:
    """Ground truth, the plain student and the distilled one's graph, image by image."""
    graph = GraphDetector(
        run_folder(output, "inherit+distil", seed) / "model_final_onnx" / "model.onnx"
    )
    plain = EagerDetector(
        run_folder(output, "student", seed) / "model_final.pth", graph.spec.score_threshold
    )
    names = {c["id"]: c["name"] for c in data.truth["categories"]}
    classes = list(names.values())
    figure = Figure(figsize=(9, 3.1 * count), layout="constrained")
    axes = figure.subplots(count, 3)
    for line, record in zip(axes, data.images[:: max(1, len(data.images) // count)]):
        image = load_image(record["file"])
        truth = [a for a in data.truth["annotations"] if a["image_id"] == record["id"]]
        boxes = np.array([a["bbox"] for a in truth]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [classes.index(names[a["category_id"]]) for a in truth]
        found = graph.detect([image])[0]
        columns = {
            "ground truth": (boxes, labels, None),
            "student alone": above(*plain.detect(record)[:3]),
            "student with FGD (ONNX)": above(found.boxes, found.scores, found.labels),
        }
        for axis, (title, (shown, classes_shown, scores)) in zip(line, columns.items()):
            axis.imshow(draw_detections(image, shown, classes_shown, classes, scores))
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    return save(figure, output / "detections.png")


def above(boxes, scores, labels, threshold: float = 0.4) -> tuple:
    """What `draw_detections` takes, of the detections worth showing."""
    keep = scores >= threshold
    return boxes[keep], labels[keep], scores[keep]


def save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    quick = ROOT / "configs" / "quick"
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--config-file", default=quick / "shapes_fgd_retinanet.yaml")
    parser.add_argument("--teacher", default=quick / "shapes_teacher_retinanet.yaml")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    output, seed = args.output.resolve(), args.seed
    started = time.perf_counter()
    train(output, args.config_file, args.teacher, seed)
    (train_json,), (test_json,) = (
        (output / "shapes").glob(f"{part}-*/annotations.json") for part in ("train", "test")
    )
    start(output, train_json, test_json)
    deployed = {
        arm: export_and_measure(run_folder(output, arm, seed), test_json)
        for arm in ("teacher", "inherit+distil")
    }
    data = load_dataset(str(test_json))
    pictures = [
        draw_comparison(output, seed, data),
        output / "maps_1.png",  # these two are the study's
        output / "losses.png",
    ]
    timed = [f"ms, {name}" for name in (*(ENGINES[x] for x in installed()), "Detectron2")]
    headers = ["", "AP", "AP50", "AP of the graph", *timed, "MiB"]
    table = tabulate(rows(output, seed, deployed), headers, "github", disable_numparse=True)
    shown = [f"![{path.stem}]({path.name})" for path in pictures]
    (output / "README.md").write_text("\n\n".join([f"# Demo, seed {seed}", table, *shown]) + "\n")
    print(f"\n{table}\n\nms: one image, one thread, median. Pictures:")
    for path in pictures:
        print(f"  {path}")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
