"""A short part of the suite, with exports, under several versions of Python and PyTorch.

`make test-matrix` runs it. Each pair gets an environment of its own, some 5 GB that are fetched
and removed again, with Detectron2 v0.6 from third_party. OUTPUT/versions.json and versions.md say
how it went; exit code 1 if any pair failed. A pair whose Python is not on this machine is said to
be not run.
"""

import argparse
import json
import shutil
import subprocess
import time
from operator import itemgetter
from pathlib import Path
from typing import List, Optional, Sequence

from tabulate import tabulate

from tools.quick import ROOT, Failed, check_each, run

NEWEST = "newest"  # PyTorch with which the newest torchvision goes
PAIRS = ("3.11:2.9", "3.12:2.11", f"3.13:{NEWEST}")
# Reading and checking, losses and their gradients, a training that is killed and goes on, ONNX
# Runtime; with the exports about five minutes on one thread.
TESTS = (
    "tests/fgd/test_compat.py",
    "tests/fgd/test_config.py",
    "tests/fgd/test_weights.py",
    "tests/fgd/methods/fgd/test_method.py",
    "tests/fgd/methods/fgd/test_terms.py",
    "tests/fgd/distillation",
    "tests/fgd/engine/test_checkpoint.py",
    "tests/fgd/engine/test_trainer.py",
    "tests/deploy/test_runtime.py",
)
# Every detector: exported and verified.
EXPORTS = ("-m", "deploy.matrix", "--columns", "static")
PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime-gpu", "onnxruntime", "openvino")
PACKAGES += ("setuptools",)
_VERSIONS = f"""\
import importlib.metadata as metadata, json, platform
found = {{d.name.lower(): d.version for d in metadata.distributions()}}
names = [name for name in {PACKAGES} if name in found]
print(json.dumps({{"python": platform.python_version(), **{{n: found[n] for n in names}}}}))
"""


def find_python(version: str) -> Optional[str]:
    """The command that starts Python ``version`` ("3.12"), or None."""
    command = shutil.which(f"python{version}")
    try:  # pyenv has commands for versions that are switched off
        works = command and subprocess.run([command, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        works = False
    return command if works else None


def install(folder: Path, python: str, torch: str, log: Path) -> str:
    """Make an environment with PyTorch ``torch`` ("2.9" or NEWEST) first; its interpreter."""
    run(log, "-m", "venv", "--clear", folder, python=python)
    own = str(folder / "bin" / "python")
    pip = ("-m", "pip", "install", "-q")
    run(log, *pip, "torchvision", *([] if torch == NEWEST else [f"torch=={torch}.*"]), python=own)
    found = versions(own)
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{name}=={found[name]}\n" for name in ("torch", "torchvision")))
    project = ("./third_party/detectron2", "-e", ".[deploy,openvino,dev,pretrained]")
    run(log, *pip, "-c", pins, *project, python=own)
    return own


def versions(python: str) -> dict:
    """{"python": …, and of PACKAGES those that are installed}."""
    return json.loads(subprocess.run([python, "-c", _VERSIONS], capture_output=True).stdout)


def check(pair: str, output: Path) -> dict:
    """All of one pair; its row, with "outcome" "passed", "not run: …" or why it failed."""
    version, torch = pair.split(":")
    row = {"pair": pair, "outcome": "passed"}
    python = find_python(version)
    if python is None:
        return {**row, "outcome": f"not run: there is no python{version}"}
    folder = output / pair.replace(":", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        own = install(folder / "venv", python, torch, folder / "install.txt")
        row["versions"] = versions(own)
        started = time.perf_counter()
        run(folder / "tests.txt", "-m", "pytest", *TESTS, python=own)
        run(folder / "exports.txt", *EXPORTS, "--output", folder / "exports", python=own)
        row["minutes"] = (time.perf_counter() - started) / 60
    except Failed as reason:
        row["outcome"] = str(reason)
    finally:
        shutil.rmtree(folder / "venv", ignore_errors=True)
    return row


def table(rows: Sequence[dict]) -> str:
    """The rows as Markdown."""
    columns: List[str] = ["python", *PACKAGES]
    cells = []
    for row in rows:
        found = row.get("versions", dict(zip(("python", "torch"), row["pair"].split(":"))))
        minutes = f"{row['minutes']:.1f}" if "minutes" in row else ""
        cells.append([*(found.get(name, "") for name in columns), minutes, row["outcome"]])
    return tabulate(cells, [*columns, "minutes", ""], "github", disable_numparse=True)


def pair(text: str) -> str:
    """A pair of the command line as it is; ValueError for anything else."""
    python, torch = text.split(":")
    for part in (python, *([] if torch == NEWEST else [torch])):
        _, _ = map(int, part.split("."))
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "versions")
    parser.add_argument(
        "--pairs", nargs="+", type=pair, default=PAIRS, help="Python:PyTorch, e.g. 3.12:2.10"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check the pairs one after the other; 1 if any failed."""
    args = build_parser().parse_args(argv)
    outcome = itemgetter("outcome")
    rows = check_each(args.output, "versions", "Versions", args.pairs, check, table, outcome)
    return int(any(not outcome(row).startswith(("passed", "not run")) for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
