"""Does distillation pay? The same student, schedule and seeds with and without it.

    python -m fgd.study --config-file configs/quick/shapes_fgd_retinanet.yaml \\
        --teacher configs/quick/shapes_teacher_retinanet.yaml --seeds 0,1,2 --output output/study

trains the teacher once, then every arm with every seed, and writes study.json and study.md. Runs
that are complete are not repeated, interrupted ones are resumed: call it again after any stop.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from tabulate import tabulate

from .checkpoint import atomic_write
from .config import load_config
from .errors import UserError

# What each arm changes in the distillation config. All else is the same, the schedule above all.
ARMS: Dict[str, Dict[str, str]] = {
    "student": {},  # plain; filled in with the student's meta-architecture
    "inherit": {"MODEL.DISTILLER.METHOD": "", "MODEL.DISTILLER.INHERIT": "True"},
    "distil": {"MODEL.DISTILLER.INHERIT": "False"},
    "inherit+distil": {"MODEL.DISTILLER.INHERIT": "True"},
}
TEACHER = "teacher"


class Run(NamedTuple):
    """One training: an arm with a seed, in a folder of its own."""

    arm: str
    seed: int
    config_file: str
    folder: Path
    opts: Dict[str, str]


def plan(
    config_file: str, teacher: str, arms: Sequence[str], seeds: Sequence[int], output: Path, opts
) -> List[Run]:
    """The runs of a study, the teacher's first if ``teacher`` names its config.

    Raises:
        UserError: an unknown arm, or no teacher.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arms: {', '.join(unknown)} unknown; there are {', '.join(ARMS)}")
    cfg = load_config(config_file, [x for pair in opts.items() for x in pair])
    weights = str(cfg.MODEL.DISTILLER.TEACHER.WEIGHTS)
    runs = []
    if teacher:
        folder = output / TEACHER
        weights = str(folder / "model_final.pth")
        runs.append(Run(TEACHER, 0, teacher, folder, _data_options(opts)))
    if not weights and set(arms) != {"student"}:
        raise UserError("no teacher: give --teacher CONFIG, or MODEL.DISTILLER.TEACHER.WEIGHTS")
    for seed in seeds:
        for arm in arms:
            own = {**opts, **ARMS[arm]}
            if arm == "student":
                own["MODEL.META_ARCHITECTURE"] = cfg.MODEL.DISTILLER.STUDENT
            else:
                own["MODEL.DISTILLER.TEACHER.WEIGHTS"] = weights
            runs.append(Run(arm, seed, config_file, output / f"{arm}_{seed}", own))
    return runs


def _data_options(opts: Dict[str, str]) -> Dict[str, str]:
    """Of the study's options the teacher takes those that say what the data is, and the device."""
    kept = ("DATASETS.", "INPUT.", "MODEL.DEVICE")
    return {k: v for k, v in opts.items() if k.startswith(kept) and "TRAIN_LIMIT" not in k}


def train(run: Run, threads: int) -> None:
    """Train one run in a process of its own, with its output in ``folder/console.txt``.

    Raises:
        UserError: the training failed; holds its last lines.
    """
    if (run.folder / "results.json").exists():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    options = {"SEED": str(run.seed), "OUTPUT_DIR": str(run.folder), **run.opts}
    command = [sys.executable, "-c", "from fgd.cli import main; raise SystemExit(main())"]
    command += ["--resume", "--config-file", run.config_file]
    command += [word for pair in options.items() for word in pair]
    started = time.perf_counter()
    with open(run.folder / "console.txt", "a") as console:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, env=environment)
    if code.returncode:
        last = (run.folder / "console.txt").read_text().strip().splitlines()[-1:]
        raise UserError(
            f"{run.arm}, seed {run.seed}, exit code {code.returncode}: {' '.join(last)}"
        )
    minutes = (time.perf_counter() - started) / 60
    _write(run.folder / "minutes.json", json.dumps(minutes))


def run_all(runs: Sequence[Run], jobs: int = 1, threads: int = 0) -> None:
    """Train the teacher, then up to ``jobs`` runs side by side; says when each is done.

    Runs that do not need the teacher start with it.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    # The pool starts runs in this order, so whoever waits for the teacher waits for a started one.
    order = {TEACHER: 0, "student": 1}
    with ThreadPoolExecutor(jobs) as pool:
        teachers: List[Future] = []

        def start(run: Run) -> None:
            if run.arm not in order:
                for teacher in teachers:
                    teacher.result()
            _announced(run, threads)

        futures = []
        for run in sorted(runs, key=lambda r: order.get(r.arm, 2)):
            futures.append(pool.submit(start, run))
            if run.arm == TEACHER:
                teachers.append(futures[-1])
        for future in futures:
            future.result()


def _announced(run: Run, threads: int) -> None:
    train(run, threads)
    box = read_result(run)["bbox"]
    print(f"{run.arm}, seed {run.seed}: AP {box['AP']:.1f} in {run.folder}", flush=True)


def read_result(run: Run) -> dict:
    """results.json of a finished run, with "minutes" if it was timed."""
    result = json.loads((run.folder / "results.json").read_text())
    timed = run.folder / "minutes.json"
    result["minutes"] = json.loads(timed.read_text()) if timed.exists() else None
    return result


def summarize(runs: Sequence[Run]) -> List[dict]:
    """One row per arm: AP and AP50 of every seed, their means and standard deviations, minutes.

    AP in percent. The deviation is of the sample; None for a single seed.
    """
    rows = []
    for arm in dict.fromkeys(r.arm for r in runs):
        results = [read_result(r) for r in runs if r.arm == arm]
        row = {"arm": arm, "seeds": [r.seed for r in runs if r.arm == arm]}
        for metric in ("AP", "AP50"):
            values = [r["bbox"][metric] for r in results]
            row[metric] = values
            row[f"{metric} mean"] = statistics.mean(values)
            row[f"{metric} sd"] = statistics.stdev(values) if len(values) > 1 else None
        minutes = [r["minutes"] for r in results if r["minutes"] is not None]
        row["minutes"] = statistics.mean(minutes) if minutes else None
        rows.append(row)
    return rows


def table(rows: Sequence[dict]) -> str:
    """The summary as a Markdown table."""

    def spread(row: dict, metric: str) -> str:
        sd = row[f"{metric} sd"]
        return f"{row[f'{metric} mean']:.1f}" + (f" ± {sd:.1f}" if sd is not None else "")

    cells = [
        [
            row["arm"],
            spread(row, "AP"),
            spread(row, "AP50"),
            " ".join(f"{value:.1f}" for value in row["AP"]),
            "" if row["minutes"] is None else f"{row['minutes']:.1f}",
        ]
        for row in rows
    ]
    headers = ["arm", "AP", "AP50", "AP of each seed", "minutes each"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def _write(path: Path, text: str) -> None:
    atomic_write(str(path), lambda file: file.write(text.encode()))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fgd.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="config of the distilled student")
    parser.add_argument("--teacher", default="", help="config of the teacher, to train it first")
    parser.add_argument("--arms", default="student,inherit+distil", help=", ".join(ARMS))
    parser.add_argument("--seeds", default="0", help="for example 0,1,2")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=0, help="per run; 0 = cores / jobs")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for every run")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the study and print its table; 2 if something could not be run."""
    args = build_parser().parse_args(argv)
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    seeds = [int(seed) for seed in args.seeds.split(",")]
    try:
        runs = plan(args.config_file, args.teacher, args.arms.split(","), seeds, args.output, opts)
        run_all(runs, args.jobs, args.threads)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = summarize(runs)
    _write(args.output / "study.json", json.dumps(rows, indent=1))
    _write(args.output / "study.md", table(rows) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
