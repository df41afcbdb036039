"""What report.json proves: teacher -> training config -> checkpoint -> graph, by their hashes."""

import hashlib
import platform
from typing import Any, Dict, Iterable

from deploy.serving.engine import Engine
from fgd.checkpoint_entries import FORMAT
from fgd_inputs.names import one_line

NOT_RECORDED = "not recorded"  # by the version of train_net.py, or the program, that wrote the file
NO_TEACHER = "none"


def origin_of(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """Who taught a student and by which config, as far as its checkpoint says so.

    Args:
        checkpoint: content of the file.
    Returns:
        "teacher": {"weights": the file as the config named it, "sha256"}, `NO_TEACHER` or
        `NOT_RECORDED`; "training_config_sha256": of the yaml text of the whole run ("full_config"),
        or `NOT_RECORDED`; "iterations": finished ones, or None; of a model_best.pth also "best":
        {metric: figure}.
    """
    teacher = checkpoint.get("teacher", NOT_RECORDED)
    if isinstance(teacher, dict):
        teacher = {key: str(teacher.get(key, NOT_RECORDED)) for key in ("weights", "sha256")}
    elif teacher is None:
        teacher = NO_TEACHER
    config, iteration = checkpoint.get("full_config"), checkpoint.get("iteration")
    known = isinstance(config, str)
    own = checkpoint.get("format") == FORMAT  # so its entries are what they should be
    best = checkpoint.get("best") if own else None
    return {
        "teacher": teacher if isinstance(teacher, dict) or teacher == NO_TEACHER else NOT_RECORDED,
        "training_config_sha256": _sha256(config) if known else NOT_RECORDED,
        "iterations": iteration + 1 if isinstance(iteration, int) else None,
        **({"best": {best["metric"]: best["figure"]}} if best else {}),
    }


def which_checkpoint(origin: Dict[str, Any]) -> str:
    """After how many iterations it was written, and by what figure it was chosen."""
    count = origin["iterations"]
    text = "iterations not recorded" if count is None else f"after {count} iterations"
    found = [f"{metric} {figure:.2f}" for metric, figure in origin.get("best", {}).items()]
    return ", ".join([text, *(f"the best of its run, {one_line(x)}" for x in found)])


def chain(origin: Dict[str, Any], hashes: Dict[str, str]) -> Dict[str, Any]:
    """The links in order, each by its SHA-256.

    Args:
        origin: of `origin_of`.  hashes: of the graph's `ModelSpec`.
    """
    return {
        "teacher": origin["teacher"],
        "training_config": {"sha256": origin["training_config_sha256"]},
        "checkpoint": {
            "sha256": hashes["checkpoint_sha256"],
            **{key: origin[key] for key in ("iterations", "best") if key in origin},
        },
        "graph": {"sha256": hashes["graph_sha256"]},
    }


def environment(versions: Dict[str, str], engines: Iterable[Engine]) -> Dict[str, str]:
    """Versions of all that had a part in making and judging the graph."""
    judges = {engine.name: engine.version for engine in engines}
    return {"python": platform.python_version(), **versions, **judges}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
