"""A benchmark's report as Markdown, and as one HTML file that needs nothing else. No dependency."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from fgd_inputs.names import html_text, markdown_text

_NONE = "–"
_TEXTS = ("row", "contender", "reason")  # columns of words, aligned left
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .8em; text-align: right;
  border-bottom: 1px solid #ddd } .text { text-align: left }
.noisy { background: #fff3cd; border-left: 4px solid #d39e00; padding: .4em 1em }
svg text { font: 13px system-ui, sans-serif } figure { margin: 1.5em 0 }
"""
_COLORS = {"graph": "#2b6cb0", "network": "#90cdf4", "client": "#63b3ed"}
_BASELINE = "#a0aec0"
# of a plot, in pixels
_WIDTH, _LABELS, _LINE, _VALUES = 900, 260, 26, 90


class Table(NamedTuple):
    """A title, column headers, and rows of texts; the first column names the row."""

    title: str
    headers: List[str]
    rows: List[List[str]]


class Bar(NamedTuple):
    """A bar of a plot; `end` is where its whisker ends, None without."""

    name: str
    kind: str
    value: float
    end: Optional[float] = None


def tables(report: Dict[str, Any]) -> List[Table]:
    """All figures of a report (see `bench_run.benchmark`): one table of rows per batch size, then
    the contenders, then what was left out."""
    found = []
    for batch in sorted({row["batch"] for row in report["rows"]}):
        rows = [row for row in report["rows"] if row["batch"] == batch]
        found.append(Table(f"Batch {batch}", *_columns(rows, _TIMES)))
    found.append(Table("Files and processes", *_columns(report["contenders"], _FACTS)))
    if report["left_out"]:
        cells = [[entry["row"], entry["reason"]] for entry in report["left_out"]]
        found.append(Table("Left out", ["row", "reason"], cells))
    return found


def _number(key: str, digits: int) -> Callable[[Dict], str]:
    def text(row):
        return _NONE if row.get(key) is None else f"{row[key]:.{digits}f}"

    return text


def _ap(key: str) -> Callable[[Dict], str]:
    return lambda row: _number(key, 1)(row.get("ap") or {})


_TIMES = {
    "row": lambda row: row["row"],
    "p50 ms": _number("p50_ms", 2),
    "p90 ms": _number("p90_ms", 2),
    "p99 ms": _number("p99_ms", 2),
    "CPU ms": _number("cpu_ms", 2),
    "images/s": _number("images_per_second", 1),
    "found": _number("found", 0),
    "to Detectron2": _number("to_eager", 2),
    "to the first graph": _number("to_first", 2),
}
_FACTS = {
    "contender": lambda row: row["name"],
    "precision": lambda row: row.get("precision", _NONE),
    "nodes": _number("nodes", 0),
    "file MiB": _number("file_mib", 2),
    "load s": _number("load_seconds", 2),
    "first call s": _number("first_seconds", 2),
    "peak memory MiB": _number("peak_mib", 0),
    "AP": _ap("AP"),
    "AP50": _ap("AP50"),
    "mask AP": _ap("mask AP"),
}


def _columns(rows: Sequence[Dict], columns: Dict[str, Callable[[Dict], str]]):
    """Headers and cells; a column with nothing in it is left out."""
    cells = {name: [text(row) for row in rows] for name, text in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {_NONE}}
    return list(cells), [list(line) for line in zip(*cells.values(), strict=True)]


def summary(report: Dict[str, Any]) -> List[str]:
    """Sentences without which the figures mean nothing."""
    machine, versions = report["machine"], report["machine"]["versions"]
    load = machine["load_average"]
    lines = [
        f"{machine['cpu']}, {machine['available_cores']} cores"
        + (f", load {load:.2f} before the run" if load is not None else "")
        + f"; threads: {report['threads']}; {report['providers'][0]}.",
        f"{report['repeats']} alternated rounds after {report['warmup']} that do not count; ratios "
        "are of medians. Rows of graphs and baselines: resized pixels to detections.",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    if report["dataset"]:
        lines.append(f"AP: {report['dataset']['name']}, {report['dataset']['images']} images.")
    return lines


def markdown(report: Dict[str, Any]) -> str:
    """The report as Markdown, columns aligned so that it can be read as it is."""
    parts = ["# Benchmark", *map(markdown_text, summary(report))]
    parts += [f"**Noisy, measure again:** {markdown_text(reason)}" for reason in report["noisy"]]
    for table in tables(report):
        lines = [[*map(markdown_text, line)] for line in (table.headers, *table.rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        left = [header in _TEXTS for header in table.headers]
        rule = ["-" * w if x else "-" * (w - 1) + ":" for w, x in zip(widths, left)]
        padded = [
            [c.ljust(w) if x else c.rjust(w) for c, w, x in zip(line, widths, left)]
            for line in (lines[0], rule, *lines[1:])
        ]
        text = "\n".join("| " + " | ".join(line) + " |" for line in padded)
        parts += [f"## {table.title}", text]
    return "\n\n".join(parts) + "\n"


def html_page(report: Dict[str, Any]) -> str:
    """The same tables and plots of them; the file refers to nothing outside itself."""
    noisy = "".join(
        f'<p class="noisy">Noisy, measure again: {html_text(reason)}</p>'
        for reason in report["noisy"]
    )
    intro = "".join(f"<p>{html_text(line)}</p>" for line in summary(report))
    body = "".join(_plots(report)) + "".join(map(_html_table, tables(report)))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Benchmark</title>'
        f"<style>{_STYLE}</style></head><body><h1>Benchmark</h1>{intro}{noisy}{body}</body></html>\n"
    )


def _html_table(table: Table) -> str:
    kinds = [' class="text"' if header in _TEXTS else "" for header in table.headers]
    head = "".join(f"<th{k}>{html_text(h)}</th>" for h, k in zip(table.headers, kinds))
    lines = (
        "<tr>" + "".join(f"<td{k}>{html_text(c)}</td>" for c, k in zip(line, kinds)) + "</tr>"
        for line in table.rows
    )
    return (
        f"<h2>{html_text(table.title)}</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _plots(report: Dict[str, Any]) -> List[str]:
    """Latency per batch size with whiskers to p99, throughput, and peak memory."""
    plots, rows = [], report["rows"]
    batches = sorted({row["batch"] for row in rows})
    for batch in batches:
        chosen = [row for row in rows if row["batch"] == batch]
        bars = [Bar(row["row"], row["kind"], row["p50_ms"], row["p99_ms"]) for row in chosen]
        plots.append(plot(f"Latency at batch {batch}: p50, whisker to p99, ms", bars))
    bars = [
        Bar(f"{row['row']}, batch {row['batch']}", row["kind"], row["images_per_second"])
        for row in rows
        if row["kind"] not in ("network", "client")
    ]
    plots.append(plot("Throughput, images per second", bars))
    peaks = [c for c in report["contenders"] if c["peak_mib"] is not None]
    if peaks:
        bars = [Bar(c["name"], c["kind"], c["peak_mib"]) for c in peaks]
        plots.append(plot("Peak memory of a process of its own, MiB", bars))
    return plots


def plot(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from 0 as an inline SVG, with the values written out."""
    most = max(max(bar.value, bar.end or 0.0) for bar in bars) or 1.0
    scale = (_WIDTH - _LABELS - _VALUES) / most
    lines = []
    for i, bar in enumerate(bars):
        top, width = i * _LINE, bar.value * scale
        color, middle = _COLORS.get(bar.kind, _BASELINE), top + _LINE / 2
        lines.append(
            f'<text x="{_LABELS - 8}" y="{middle + 4:.1f}" text-anchor="end">{html_text(bar.name)}'
            f'</text><rect x="{_LABELS}" y="{top + 4}" width="{width:.1f}" height="{_LINE - 8}" '
            f'fill="{color}"></rect>'
        )
        end = _LABELS + max(bar.end or 0.0, bar.value) * scale
        if bar.end is not None:
            lines.append(
                f'<path d="M{_LABELS + width:.1f} {middle}H{end:.1f}M{end:.1f} {middle - 5}v10" '
                'stroke="#222" fill="none"></path>'
            )
        lines.append(f'<text x="{end + 6:.1f}" y="{middle + 4:.1f}">{bar.value:.4g}</text>')
    height = len(bars) * _LINE
    return (
        f'<figure><figcaption>{html_text(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" '
        f'width="100%" role="img" aria-label="{html_text(title)}">{"".join(lines)}</svg></figure>'
    )
