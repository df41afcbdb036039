"""What a study's pages say: sections of text, table and picture, whatever they are written in."""

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from .runs import kinds
from .summary import METRICS

NONE = "–"
KINDS = {"bbox": "boxes", "segm": "masks"}


class Section(NamedTuple):
    """A heading, what the reader must know, then a table (headers first) and a picture."""

    title: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    picture: Optional[Path] = None


def number(value: Optional[float], places: int = 1, sign: bool = False) -> str:
    if value is None or value != value:
        return NONE
    return f"{value:{'+' if sign else ''}.{places}f}"


def mean_and_sd(values: Dict[str, Any]) -> str:
    sd = values["sd"]
    return number(values["mean"]) + ("" if sd is None else f" ± {number(sd)}")


def summary_table(rows: Sequence[dict], kind: str) -> List[List[str]]:
    """Arms and their AP of one kind; "gap closed" is left out where no arm has it."""
    rows = [row for row in rows if kind in row]
    names = [name for name in METRICS if name in rows[0][kind]]
    columns: Dict[str, Callable[[dict], str]] = {"arm": lambda row: row["arm"]}
    for name in names:
        columns[name] = lambda row, name=name: mean_and_sd(row[kind][name])
    if any(row[kind]["gap closed"] is not None for row in rows):
        columns["gap closed, %"] = lambda row: number(row[kind]["gap closed"], 0)
    columns["AP of each seed"] = lambda row: " ".join(map(number, row[kind]["AP"]["each"]))
    columns["iterations"] = lambda row: str(row["iterations"] or NONE)
    columns["minutes each"] = lambda row: number(row["minutes"])
    return [list(columns), *([text(row) for text in columns.values()] for row in rows)]


def change_table(rows: Sequence[dict]) -> List[List[str]]:
    """One row per class of one pair of arms."""
    cells = [
        [
            row["class"],
            number(row["difference"], 2, sign=True),
            f"{number(row['low'], 2, sign=True)} … {number(row['high'], 2, sign=True)}",
            NONE if row["p"] != row["p"] else f"{row['p']:.3f}",
        ]
        for row in rows
    ]
    return [["class", "change of AP", "95 % interval", "p"], *cells]


def sections(study: Dict[str, Any], pictures: Dict[str, Path]) -> List[Section]:
    """The report of a study as `__main__.collect` describes it.

    Args:
        pictures: caption → file.
    """
    rows = study["arms"]
    found = [Section("Study", study["facts"])]
    if study["missing"]:
        found.append(Section("Missing", study["missing"]))
    for kind in [kind for kind in KINDS if any(kind in kinds(row) for row in rows)]:
        found.append(Section(f"AP, {KINDS[kind]}", _SUMMARY, summary_table(rows, kind)))
    first = True
    for kind, compared in study["changes"].items():
        for pair in dict.fromkeys((row["arm"], row["against"]) for row in compared):
            chosen = [row for row in compared if (row["arm"], row["against"]) == pair]
            seeds = ", ".join(map(str, chosen[0]["seeds"]))
            title = f"{pair[0]} against {pair[1]}, {KINDS[kind]}"
            text = [*(study["test"] if first else ()), f"Mean over seeds {seeds}."]
            found.append(Section(title, text, change_table(chosen)))
            first = False
    found += [Section(caption, picture=path) for caption, path in pictures.items()]
    return found


_SUMMARY = (
    "COCO AP in percent on the test images, mean ± standard deviation over the seeds. Gap closed: "
    "how far an arm's mean gets from the student's to the teacher's. Minutes: by the clock, "
    "whatever else the machine was doing.",
)
