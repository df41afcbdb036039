"""What a study's pages say: sections of text, table and picture, whatever they are written in."""

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from .arms import STUDENT, TEACHER
from .bootstrap import ALL
from .classes import CLASS_TEXT, class_table
from .comparisons import LEVEL, verdict
from .runs import kinds
from .summary import METRICS, spread

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


def each(values: Sequence[float]) -> str:
    """One number if all are equal, otherwise one per seed."""
    texts = [f"{value:g}" for value in values]
    return " ".join(dict.fromkeys(texts) if len(set(texts)) == 1 else texts) or NONE


def summary_table(rows: Sequence[dict], kind: str) -> List[List[str]]:
    """Arms and their AP of one kind; columns that no arm has are left out."""
    rows = [row for row in rows if kind in row]
    names = [name for name in METRICS if name in rows[0][kind]]
    student = next((row["seconds"] for row in rows if row["arm"] == STUDENT), None)
    columns: Dict[str, Callable[[dict], str]] = {"arm": lambda row: row["arm"]}
    for name in names:
        columns[name] = lambda row, name=name: mean_and_sd(row[kind][name])
    if any(row[kind]["gap closed"] is not None for row in rows):
        columns["gap closed, %"] = lambda row: number(row[kind]["gap closed"], 0)
    columns["AP of each seed"] = lambda row: " ".join(map(number, row[kind]["AP"]["each"]))
    if any(row["factors"] for row in rows):
        columns["factor"] = lambda row: each(row["factors"])
    columns["iterations"] = lambda row: str(row["iterations"] or NONE)
    if any("chosen" in row for row in rows):
        columns["chosen at"] = lambda row: each(row.get("chosen", []))
    columns["minutes each"] = lambda row: number(row["minutes"])
    if student:
        columns["step time"] = lambda row: number(row["seconds"] and row["seconds"] / student, 2)
    return [list(columns), *([text(row) for text in columns.values()] for row in rows)]


def change_table(rows: Sequence[dict]) -> List[List[str]]:
    """One row per class of one pair of arms; effect and interval first, p last."""
    return [["class", *_TEST], *([row["class"], *_cells(row)] for row in rows)]


def comparison_table(rows: Sequence[dict]) -> List[List[str]]:
    """One row per pair of arms: all classes, effect and interval first, p last."""
    cells = [[row["arm"], row["against"], *_cells(row)] for row in rows]
    return [["arm", "against", *_TEST], *cells]


_TEST = ("change of AP", "95 % interval", "", "p", "p, corrected")


def _cells(row: dict) -> List[str]:
    return [
        number(row["difference"], 2, sign=True),
        f"{number(row['low'], 2, sign=True)} … {number(row['high'], 2, sign=True)}",
        verdict(row) or NONE,
        _p(row["p"]),
        _p(row["corrected"]),
    ]


def _p(value: float) -> str:
    return NONE if value != value else f"{value:.3f}"


def stage_table(stages: Sequence[dict], kind: str) -> List[List[str]]:
    """One row per stage of a chain of teachers, its AP over the seeds."""
    columns = ("stage", "config", "method", "teacher", "iterations")
    cells = []
    for row in stages:
        ends = [
            mean_and_sd(spread([x[kind]["AP"] for x in row[end] if x is not None]))
            for end in ("start", "end")
        ]
        cells.append([*(str(row[name]) or NONE for name in columns), *ends])
    return [[*columns, "AP at the start", "AP at the end"], *cells]


def ranked_table(rows: Sequence[dict], compared: Sequence[dict], kind: str) -> List[List[str]]:
    """Arms by falling mean AP, and what may be said of each against every arm it is tested with.

    Args:
        rows: of `summarize`. compared: rows of all classes, of this kind.
    """
    shown = [row for row in rows if row["arm"] != TEACHER and kind in row]
    shown = [row for row in shown if row[kind]["AP"]["mean"] is not None]
    shown.sort(key=lambda row: -row[kind]["AP"]["mean"])
    others = list(dict.fromkeys(row["against"] for row in compared))
    found = {
        (row["arm"], row["against"]): f"{number(row['difference'], 1, sign=True)} {verdict(row)}"
        for row in compared
    }
    cells = [
        [
            row["arm"],
            mean_and_sd(row[kind]["AP"]),
            *(found.get((row["arm"], x), "") for x in others),
        ]
        for row in shown
    ]
    return [["arm", "AP", *(f"against {x}" for x in others)], *cells]


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
    ended = [result for row in study["stages"] for result in row["end"]]
    for kind in [kind for kind in KINDS if any(kind in result for result in ended)]:
        table = stage_table(study["stages"], kind)
        found.append(Section(f"Teachers in a row, {KINDS[kind]}", _STAGES, table))
    for kind, compared in study["changes"].items():
        overall = [row for row in compared if row["class"] == ALL]
        ranked = ranked_table(rows, overall, kind)
        found.append(Section(f"Ranked by AP, {KINDS[kind]}", _RANKED, ranked))
    text = study["test"]
    for kind, compared in study["changes"].items():
        overall = [row for row in compared if row["class"] == ALL]
        title = f"Comparisons of all classes, {KINDS[kind]}"
        if overall:
            found.append(Section(title, text, comparison_table(overall)))
            text = ()  # explained once
    for kind, compared in study["changes"].items():
        table = class_table(rows, compared, kind)
        if table:
            found.append(Section(f"Classes and sizes, {KINDS[kind]}", CLASS_TEXT, table))
        found += _by_class(compared, KINDS[kind])
    found += [Section(caption, picture=path) for caption, path in pictures.items()]
    return found


def _by_class(compared: Sequence[dict], kind: str) -> List[Section]:
    """Tables of pairs of arms where there are several classes; the teacher's are counted only."""
    found = []
    pairs = dict.fromkeys((row["arm"], row["against"]) for row in compared)
    for pair in (pair for pair in pairs if pair[1] != TEACHER):
        chosen = [row for row in compared if (row["arm"], row["against"]) == pair]
        seeds = ", ".join(map(str, chosen[0]["seeds"]))
        text = [f"Mean over seeds {seeds}. The corrected p is Holm's over these classes."]
        if len(chosen) > 1:
            found.append(
                Section(f"{pair[0]} against {pair[1]}, {kind}", text, change_table(chosen))
            )
    return found


_SUMMARY = (
    "COCO AP in percent on the test images, mean ± standard deviation over the seeds. Gap closed: "
    "how far an arm's mean gets from the student's to the teacher's. Factor: the runs' "
    "MODEL.DISTILLER.FACTOR, one number if all seeds have the same. Minutes: by the clock, "
    "whatever else the machine was doing. Step time: median seconds per iteration, over the "
    "student's.",
)
_STAGES = (
    "Every stage but the first starts from the student of the one before. Its AP at the start was "
    "evaluated before its first step, and has to be the AP at the end of the one before.",
)
_RANKED = (
    f"Arms by mean AP. The order alone claims nothing: an arm is ahead or behind where the "
    f"corrected p below is at most {LEVEL}, and otherwise not told apart.",
)
