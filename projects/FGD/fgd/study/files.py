"""What a study reads and writes in its folders."""

import json
from pathlib import Path
from typing import Any, List, Optional

from fgd_inputs.json_file import number, read_json

from ..config import META_ARCHITECTURE
from ..engine.results import RESULTS, evaluated_otherwise, read_results, without_ap
from ..errors import UserError
from ..files import atomic_write
from ..yaml_config import leaves, parse_yaml
from .arms import method_of
from .run import Run

START = "start.json"
MINUTES, CONSOLE = "minutes.json", "console.txt"
_MEASURED = "measured.json"  # of arms of methods: true or false


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written, for example because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(str(path), lambda file: file.write(content))
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room, then call again: what is "
            "finished stays, and --report writes the pages alone"
        ) from error


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def has_results(run: Run) -> bool:
    """Whatever they are of."""
    return (run.reported / RESULTS).exists()


def is_finished(run: Run) -> bool:
    """Whether it has results, which are of its checkpoint and of the test data."""
    return has_results(run) and not disbelieved(run)


def disbelieved(run: Run) -> str:
    """Why the results that are there do not count, "" if they do, as far as is known."""
    if not has_results(run):
        return ""
    reason = evaluated_otherwise(read_result(run), run.weights, run.tested)
    return reason and f"{run}: {run.reported / RESULTS} {reason}"


def read_minutes(run: Run) -> Optional[float]:
    """Wall time of all attempts at a run; None if nobody took it."""
    return number(_read(run.folder / MINUTES))


def read_result(run: Run) -> dict:
    """results.json of a run that has one: {"iteration", "bbox": {"AP": ...}, ...}, in percent."""
    return read_results(str(run.reported / RESULTS))


def no_ap(run: Run) -> List[str]:
    """Sentences on a finished run that has no AP, which is then "–" on the page."""
    kinds = without_ap(read_result(run))
    return [f"{run}: {kind} has no AP, because nothing was detected" for kind in kinds]


def read_start(run: Run) -> Optional[dict]:
    """As `read_result`, of its evaluation before step one; None if there was none."""
    path = run.folder / START
    return read_results(str(path)) if path.exists() else None


def write_measured(run: Run) -> None:
    """Record once whether a run measures its factor or was given it, which no config says."""
    path = run.folder / _MEASURED
    if method_of(run.arm) and not path.exists():
        write_json(path, run.balance)


def was_given_factor(run: Run) -> bool:
    """Whether it is known to have begun with a given factor."""
    return _read(run.folder / _MEASURED) is False


def _read(path: Path) -> Any:
    """What a JSON of the study's own holds; None where there is none."""
    return read_json(str(path), "study file") if path.exists() else None


def read_factor(run: Run) -> Optional[float]:
    """MODEL.DISTILLER.FACTOR that a run was trained with; None if it has no distillation."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return None
    keys = dict(leaves(parse_yaml(path.read_text(), str(path))))
    distilled = keys.get("MODEL.META_ARCHITECTURE") == META_ARCHITECTURE
    distilled = distilled and keys.get("MODEL.DISTILLER.METHOD")
    return float(keys["MODEL.DISTILLER.FACTOR"]) if distilled else None
