"""results.json of a run: its figures, and which checkpoint and test data they are of."""

import math
import os
from typing import Any, List, Mapping

from fgd_inputs.json_file import number, read_json, shown

from ..errors import UserError
from ..weights import weights_sha256

RESULTS, FINAL, BEST = "results.json", "model_final.pth", "model_best.pth"
EVALUATED = "evaluated"  # the entry on what was evaluated


def read_results(path: str) -> dict:
    """The content of a results.json: {"iteration", "evaluated", "bbox": {"AP": ...}, ...}.

    Raises:
        UserError: it cannot be read, or has something else than metrics.
    """
    try:
        content = read_json(path, "results")
    except UserError as error:
        raise UserError(f"{error}; without that file the run is evaluated again") from error
    if not isinstance(content, dict) or "iteration" not in content:
        raise UserError(f"results {path}: this is no results.json of a run; delete it")
    for key in content.keys() - {EVALUATED}:
        _check_metrics(f"results {path}: {key}", content[key])
    if not isinstance(content.get(EVALUATED, {}), dict):
        raise UserError(f"results {path}: {EVALUATED} is {shown(content[EVALUATED])}; delete it")
    return content


def without_ap(results: Mapping[str, Any]) -> List[str]:
    """Names of what has no AP in a results.json: "bbox" and such, of several sets "SET bbox"."""
    found = []
    for name, value in results.items():
        if isinstance(value, dict) and name != EVALUATED:
            missing = "AP" in value and value["AP"] is None
            found += [name] if missing else [f"{name} {x}" for x in without_ap(value)]
    return found


def _check_metrics(where: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, metric in value.items():
            _check_metrics(f"{where} {name}", metric)
        return
    found = number(value)
    if value is not None and (found is None or not math.isfinite(found)):
        raise UserError(f"{where} is {shown(value)}; expected a number or null")


def evaluated_otherwise(results: Mapping[str, Any], weights: str, tested: Mapping[str, str]) -> str:
    """Why results are not those of a checkpoint on a test set; "" if they are, as far as is known.

    Args:
        results: of `read_results`; those of earlier versions do not say what they are of.
        weights: the checkpoint; if it is gone, nothing contradicts them.
        tested: of `fgd.data.contents.describe_sets`; {} = not known.
    """
    evaluated = results.get(EVALUATED, {})
    own = evaluated.get("weights")
    if own and os.path.isfile(weights) and weights_sha256(weights) != own:
        return f"is of another checkpoint than {weights}"
    other = [key for key, value in tested.items() if evaluated.get(key, value) != value]
    return f"is of other test data ({' and '.join(other)} differ)" if other else ""
