"""What a study reads and writes in its folders."""

import json
from pathlib import Path
from typing import Any, Optional

from ..config import META_ARCHITECTURE
from ..files import atomic_write
from ..yaml_config import leaves, parse_yaml
from .arms import method_of
from .run import Run

RESULTS, START = "results.json", "start.json"
MINUTES, CONSOLE = "minutes.json", "console.txt"
_MEASURED = "measured.json"  # of arms of methods: true or false


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(str(path), lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def is_finished(run: Run) -> bool:
    return (run.folder / RESULTS).exists()


def read_minutes(run: Run) -> Optional[float]:
    """Wall time of all attempts at a run; None if nobody took it."""
    path = run.folder / MINUTES
    return json.loads(path.read_text()) if path.exists() else None


def read_result(run: Run) -> dict:
    """results.json of a finished run: {"iteration", "bbox": {"AP": ...}, ...}, in percent."""
    return json.loads((run.folder / RESULTS).read_text())


def read_start(run: Run) -> Optional[dict]:
    """As `read_result`, of its evaluation before step one; None if there was none."""
    path = run.folder / START
    return json.loads(path.read_text()) if path.exists() else None


def write_measured(run: Run) -> None:
    """Record once whether a run measures its factor or was given it, which no config says."""
    path = run.folder / _MEASURED
    if method_of(run.arm) and not path.exists():
        write_json(path, run.balance)


def was_given_factor(run: Run) -> bool:
    """Whether it is known to have begun with a given factor."""
    path = run.folder / _MEASURED
    return path.exists() and not json.loads(path.read_text())


def read_factor(run: Run) -> Optional[float]:
    """MODEL.DISTILLER.FACTOR that a run was trained with; None if it has no distillation."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return None
    keys = dict(leaves(parse_yaml(path.read_text(), str(path))))
    distilled = keys.get("MODEL.META_ARCHITECTURE") == META_ARCHITECTURE
    distilled = distilled and keys.get("MODEL.DISTILLER.METHOD")
    return float(keys["MODEL.DISTILLER.FACTOR"]) if distilled else None
