"""Command: which architecture can be exported how, found out by doing it.

Every cell is an export of a tiny model with well-conditioned weights, verified as every export is:
in each engine that is installed.
"""

import argparse
import contextlib
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from deploy.checks.tiny import CLASSES, TINY, conditioned, tiny_cfg, write_scenes
from deploy.errors import ParityError, UserError, run_main
from deploy.export import export
from deploy.files import make_folder, write_atomically, write_json
from deploy.reduced.precision import Reduction
from fgd_inputs.names import markdown_text

# Points of AP that int8 may lose here: the default of the export command is for trained weights.
# Untrained ones tell boxes apart by less, so rounding changes more of what NMS keeps.
_INT8_AP_DROP = 25.0
# Column -> options of `export`, from the path of a dataset (`tiny.write_scenes`). A new one is one
# line.
COLUMNS: Dict[str, Callable[[Path], Dict[str, Any]]] = {
    "static": lambda _: {"dynamic": "none"},
    "dynamic batch": lambda _: {"dynamic": "batch"},
    "dynamic image": lambda _: {"dynamic": "image"},
    "uint8 input": lambda _: {"input_dtype": "uint8"},
    "fp16": lambda _: {"reduction": Reduction(("fp16",))},
    "int8": lambda dataset: {
        "reduction": Reduction(
            ("int8",),
            calibration=str(dataset.with_name("others")),
            dataset=str(dataset),
            max_ap_drop=_INT8_AP_DROP,
        )
    },
    "TensorRT profile": lambda _: {"target": "tensorrt"},
}
_OUTCOMES = {UserError: "refused", ParityError: "failed"}
_PACKAGES = ("torch", "detectron2", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
_PACKAGES += ("openvino",)
_EXAMPLES = """examples:
  python -m deploy.matrix --output output/matrix
  python -m deploy.matrix --output output/matrix --architectures FCOS --columns static fp16

Writes OUTPUT/matrix.md and OUTPUT/matrix.json, and of every cell the files of its export with all
that it printed. A cell is "yes" only if this run exported and verified it. Exit code 1 if a cell
crashed, which is a bug; one that was refused or failed verification has its reason in the table.
"""


def make_matrix(output, architectures: Sequence[str], columns: Sequence[str]) -> Dict[str, Any]:
    """Export and verify every pair.

    Args:
        output: folder; each cell gets a folder of its own in it.
        architectures: names of `deploy.checks.tiny.TINY`.  columns: names of `COLUMNS`.
    Returns:
        What matrix.json holds: "versions", "columns", and "rows" {architecture: {column: cell}}
        (see `make_cell`).
    Raises:
        UserError: the folder cannot be written.
    """
    rows: Dict[str, Dict[str, Any]] = {}
    for name in architectures:
        folder = Path(output) / _file_name(name)
        checkpoint, dataset = _save_tiny(name, folder)
        rows[name] = {}
        for column in columns:
            cell = make_cell(checkpoint, folder / _file_name(column), COLUMNS[column](dataset))
            rows[name][column] = cell
            print(f"{name}, {column}: {cell['outcome']} ({cell['seconds']:.0f} s)", flush=True)
    return {"versions": _versions(), "columns": list(columns), "rows": rows}


def make_cell(checkpoint: Path, folder: Path, options: Dict[str, Any]) -> Dict[str, Any]:
    """One export with these options. What it prints goes to `folder`/log.txt.

    Returns:
        "outcome": "yes", or "refused" (a UserError), "failed" (a ParityError) or "crashed" (any
        other exception) with its "reason"; "seconds"; for "yes" also "engines", all of which
        passed it, "verification" of the float32 graph in the first of them, and "ap" there of each
        other precision beside it (None where it was not measured).
    """
    make_folder(folder)
    cell: Dict[str, Any] = {"outcome": "yes"}
    started = time.perf_counter()
    with open(folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            report = export(checkpoint, folder, force=True, **options)
            cell["engines"] = [str(engine) for engine in report.engines]
            tally = report.to_dict()["tally"]
            keys = ("expected", "matched", "box_error", "score_error", "mask_error")
            cell["verification"] = {key: tally[key] for key in keys}
            made = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            cell["ap"] = {
                name: details["ap"] for name, details in made.get("precisions", {}).items()
            }
        except Exception as error:  # one cell must not cost the others
            cell["outcome"] = _OUTCOMES.get(type(error), "crashed")
            kind = f"{type(error).__name__}: " if cell["outcome"] == "crashed" else ""
            cell["reason"] = kind + " ".join(str(error).split())
    return {**cell, "seconds": round(time.perf_counter() - started, 1)}


def to_markdown(matrix: Dict[str, Any]) -> str:
    """The table, with the reason of every cell that is not "yes" beneath it."""
    columns, reasons = matrix["columns"], []
    lines = [f"| | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    for name, cells in matrix["rows"].items():
        texts = []
        for column in columns:
            cell = cells[column]
            texts.append(cell["outcome"])
            if cell["outcome"] != "yes":
                reason = markdown_text(cell["reason"])
                reasons.append(f"- {name}, {column}: {cell['outcome']}: {reason}")
        lines.append(f"| {name} | {' | '.join(texts)} |")
    if "int8" in columns:
        reasons.append(
            f"- int8: within {_INT8_AP_DROP:g} points of AP, as the weights are untrained."
        )
    cells = [cell for row in matrix["rows"].values() for cell in row.values()]
    engines = dict.fromkeys(name for cell in cells for name in cell.get("engines", ()))
    if engines:
        reasons.append(f"- yes: in {' and in '.join(engines)}.")
    versions = ", ".join(f"{name} {number}" for name, number in matrix["versions"].items())
    return "\n".join([*lines, "", *reasons, *([""] if reasons else []), f"Made with {versions}."])


def _save_tiny(name: str, folder: Path) -> Tuple[Path, Path]:
    """The checkpoint that train_net.py would write of a tiny model, and a dataset for it."""
    make_folder(folder)
    cfg = tiny_cfg(name)
    model = conditioned(cfg)
    content = {"model": model.state_dict(), "config": cfg.dump(), "classes": CLASSES}
    torch.save({**content, "format": "fgd-1"}, folder / "tiny.pth")
    return folder / "tiny.pth", write_scenes(folder, model)


def _file_name(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def _versions() -> Dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(ImportError):  # one of ONNX Runtime's two packages is enough
            found[package] = version(package)
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.matrix",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    for option, names in (("--architectures", TINY), ("--columns", COLUMNS)):
        parser.add_argument(
            option, nargs="+", choices=list(names), default=list(names), help="default: all"
        )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _main(argv: Optional[List[str]]) -> int:
    args = build_parser().parse_args(argv)
    matrix = make_matrix(args.output, args.architectures, args.columns)
    text = to_markdown(matrix)
    write_json(Path(args.output) / "matrix.json", matrix)
    write_atomically(Path(args.output) / "matrix.md", (text + "\n").encode("utf-8"))
    print(text)
    cells = [cell for row in matrix["rows"].values() for cell in row.values()]
    return int(any(cell["outcome"] == "crashed" for cell in cells))


def main(argv: Optional[List[str]] = None) -> int:
    """Exit code: 0 every cell was decided, 1 one crashed, 2 bad usage."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
