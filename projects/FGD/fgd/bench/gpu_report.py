"""Rows of the GPU run: a figure, its bound, and whether the bound makes a part wrong."""

import math
from typing import Any, Dict, List, Optional

from tabulate import tabulate

# Of a part. "wrong": a figure that has to hold does not; "failed": it broke off; "skipped": the
# time was used up.
OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "failed", "skipped"

Row = Dict[str, Any]


def row(
    what: str, value: Optional[float], at_most: Optional[float] = None, must: bool = False
) -> Row:
    """One figure for gpu.json and the table; a NaN or infinite one is None there.

    Args:
        value: None where it was not measured. at_most: its goal.
        must: a value beyond the goal is an error, not only a goal that is missed.
    """
    measured = value is not None
    value = float(value) if measured else None
    finite = measured and math.isfinite(value)
    met = None if at_most is None or not measured else finite and value <= at_most
    text = "" if not measured else f"{value:.3g}"
    return {
        "what": what,
        "value": value if finite else None,
        "text": text,
        "at_most": at_most,
        "met": met,
        "must": must,
    }


def note(what: str, text: str, met: Optional[bool] = None, must: bool = False) -> Row:
    """A row in words; with ``must`` it is an error if it is not ``met``."""
    return {"what": what, "value": None, "text": text, "at_most": None, "met": met, "must": must}


def plain(value: Any) -> Any:
    """The same as JSON has it: None for what is NaN or infinite, text for what JSON has not."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def status_of(rows: List[Row]) -> str:
    return WRONG if any(x["must"] and x["met"] is False for x in rows) else OK


def exit_code(parts: List[Dict[str, Any]]) -> int:
    """4 where a figure is wrong, else 1 where a part broke off, else 0: to skip is no fault."""
    found = {part["status"] for part in parts}
    return 4 if WRONG in found else 1 if FAILED in found else 0


def title(machine: Dict[str, Any]) -> str:
    """The kind of card and the versions that the figures belong to."""
    card = machine.get("gpu", f"no GPU, {machine['cpu']}")
    versions = machine["versions"]
    names = (f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
    return ", ".join([card, f"CUDA {machine['cuda']}" if machine.get("cuda") else "CPU", *names])


def table(run: Dict[str, Any]) -> str:
    """The whole run as Markdown: the card, then a line for each figure."""
    lines = [_line(part, x) for part in run["parts"] for x in part["rows"] or [_of(part)]]
    cells = tabulate(
        lines, ["part", "what", "figure", "goal", ""], tablefmt="github", disable_numparse=True
    )
    times = ", ".join(f"{part['part']} {part['seconds']:.0f}" for part in run["parts"])
    sizes = "\nTiny sizes: its speeds mean nothing." if run["tiny"] else ""
    heading = f"# {title(run['machine'])}\n{sizes}\n" if sizes else f"# {title(run['machine'])}\n"
    return f"{heading}\n{cells}\n\nSeconds: {times}; of a budget of {run['budget_s']:.0f}.\n"


def _of(part: Dict[str, Any]) -> Row:
    """The row of a part that has none."""
    return note("", part["error"] or part["status"])


def _line(part: Dict[str, Any], x: Row) -> List[str]:
    verdict = {None: "", True: "met", False: "WRONG" if x["must"] else "missed"}[x["met"]]
    if part["status"] in (FAILED, SKIPPED):
        verdict = part["status"].upper() if part["status"] == FAILED else part["status"]
    goal = "" if x["at_most"] is None else f"≤ {x['at_most']:g}"
    text = x["text"].replace("|", "/").replace("\n", " ")
    return [part["part"], x["what"], text, goal, verdict]
