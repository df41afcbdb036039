"""What a study's pages say: sections of text, table and picture, whatever they are written in."""

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from .arms import STUDENT, TEACHER
from .bootstrap import ALL
from .classes import PART_TEXT, part_table
from .comparisons import LEVEL, verdict
from .runs import kinds
from .summary import METRICS, spread

NONE = "–"
KINDS = {"bbox": "boxes", "segm": "masks"}


# Captions of pictures that have a place of their own on the page; all others come last.
AP_FIGURE, LATENCY, EXAMPLES = "AP of each seed", "AP against latency", "Test images"


class Section(NamedTuple):
    """A heading, what the reader must know, then a picture and a table (headers first).

    folded: what few readers look at; HTML shows the heading, and the rest when it is opened.
    """

    title: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    picture: Optional[Path] = None
    folded: bool = False


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


Columns = Dict[str, Callable[[dict], str]]


def _table(columns: Columns, rows: Sequence[dict]) -> List[List[str]]:
    """Arms are lines; a column without a figure is left out."""
    cells = {name: [text(row) for row in rows] for name, text in columns.items()}
    cells = {name: found for name, found in cells.items() if set(found) != {NONE}}
    return [list(cells), *map(list, zip(*cells.values()))]


def summary_table(rows: Sequence[dict], kind: str) -> List[List[str]]:
    """Arms and their AP of one kind."""
    rows = [row for row in rows if kind in row]
    columns: Columns = {"arm": lambda row: row["arm"]}
    for name in (name for name in METRICS if name in rows[0][kind]):
        columns[name] = lambda row, name=name: mean_and_sd(row[kind][name])
    columns["gap closed, %"] = lambda row: number(row[kind]["gap closed"], 0)
    columns["AP of each seed"] = lambda row: " ".join(map(number, row[kind]["AP"]["each"]))
    return _table(columns, rows)


def training_table(rows: Sequence[dict]) -> List[List[str]]:
    """Arms and how they were trained."""
    student = next((row["seconds"] for row in rows if row["arm"] == STUDENT), None)
    columns: Columns = {
        "arm": lambda row: row["arm"],
        "seeds": lambda row: " ".join(map(str, row["seeds"])),
        "iterations": lambda row: str(row["iterations"] or NONE),
        "minutes each": lambda row: number(row["minutes"]),
        "step time": lambda row: number(student and row["seconds"] and row["seconds"] / student, 2),
        "chosen at": lambda row: each(row.get("chosen", [])),
        "factor": lambda row: each(row["factors"]),
    }
    return _table(columns, rows)


def change_table(rows: Sequence[dict]) -> List[List[str]]:
    """One row per class or size of one pair of arms; effect and interval first, p last."""
    names = [row.get("class") or f"{row['size']} objects" for row in rows]
    return [["class", *_TEST], *([x, *_cells(row)] for x, row in zip(names, rows, strict=True))]


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
    rows, changes = study["arms"], study["changes"]
    overall = {k: [x for x in compared if x["class"] == ALL] for k, compared in changes.items()}
    found = [Section(_TITLE, study["headline"], picture=pictures.get(AP_FIGURE))]
    if EXAMPLES in pictures:
        found.append(Section(EXAMPLES, _EXAMPLES, picture=pictures[EXAMPLES]))
    found.append(Section(LATENCY, study["latency"]["text"], picture=pictures.get(LATENCY)))
    found += [Section("Missing", study["missing"])] if study["missing"] else []
    found.append(Section("How it was compared", study["facts"]))
    for kind, compared in overall.items():
        ranked = ranked_table(rows, compared, kind)
        found.append(Section(f"Ranked by AP, {KINDS[kind]}", _RANKED, ranked))
    for kind in [kind for kind in KINDS if any(kind in kinds(row) for row in rows)]:
        found.append(Section(f"AP, {KINDS[kind]}", _SUMMARY, summary_table(rows, kind)))
    found.append(Section("Training", _TRAINING, training_table(rows)))
    found += _chains(study["stages"])
    text = study["test"]
    for kind, compared in overall.items():
        title = f"Comparisons of all classes, {KINDS[kind]}"
        if compared:
            found.append(Section(title, text, comparison_table(compared)))
            text = ()  # explained once
    found += _parts(study)
    shown = (AP_FIGURE, LATENCY, EXAMPLES)
    others = {caption: path for caption, path in pictures.items() if caption not in shown}
    return found + [Section(caption, picture=path) for caption, path in others.items()]


def _chains(stages: Sequence[dict]) -> List[Section]:
    ended = [result for row in stages for result in row["end"]]
    return [
        Section(f"Teachers in a row, {KINDS[kind]}", _STAGES, stage_table(stages, kind))
        for kind in KINDS
        if any(kind in result for result in ended)
    ]


def _parts(study: Dict[str, Any]) -> List[Section]:
    """Classes and sizes: counted arm by arm, then one by one for each pair of arms."""
    found, text = [], PART_TEXT
    for title, changes, part in (("Classes", "changes", "class"), ("Sizes", "sizes", "size")):
        for kind, compared in study[changes].items():
            table = part_table(study["arms"], compared, kind, part)
            if table:
                found.append(Section(f"{title}, {KINDS[kind]}", text, table))
                text = ()
    for kind, compared in study["changes"].items():
        found += _by_pair([*compared, *study["sizes"].get(kind, [])], KINDS[kind])
    return found


def _by_pair(compared: Sequence[dict], kind: str) -> List[Section]:
    """Tables of pairs of arms; those with the teacher are counted only."""
    found = []
    pairs = dict.fromkeys((row["arm"], row["against"]) for row in compared)
    for pair in (pair for pair in pairs if pair[1] != TEACHER):
        chosen = [row for row in compared if (row["arm"], row["against"]) == pair]
        chosen = [row for row in chosen if "class" in row or row["p"] == row["p"]]
        seeds = ", ".join(map(str, chosen[0]["seeds"]))
        text = [f"Mean over seeds {seeds}. The corrected p is Holm's over these classes or sizes."]
        if len(chosen) > 1:
            title, table = f"{pair[0]} against {pair[1]}, {kind}", change_table(chosen)
            found.append(Section(title, text, table, folded=True))
    return found


_TITLE = "Does distillation pay?"
_EXAMPLES = (
    "Four test images, evenly spaced. Of each arm, on the first seed, as many of the best "
    "detections as there are objects: a solid box has found one (IoU of 0.5 and its class), a "
    "dotted one has not.",
)
_SUMMARY = (
    "COCO AP in percent on the test images, mean ± standard deviation over the seeds. Gap closed: "
    "how far an arm's mean gets from the student's to the teacher's.",
)
_TRAINING = (
    "Minutes: by the clock, whatever else the machine was doing. Step time: median seconds per "
    "iteration, over the student's. Factor: the runs' MODEL.DISTILLER.FACTOR, one number if all "
    "seeds have the same.",
)
_STAGES = (
    "Every stage but the first starts from the student of the one before. Its AP at the start was "
    "evaluated before its first step, and has to be the AP at the end of the one before.",
)
_RANKED = (
    f"Arms by mean AP. The order alone claims nothing: an arm is ahead or behind where the "
    f"corrected p below is at most {LEVEL}, and otherwise not told apart.",
)
