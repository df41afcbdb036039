"""The loss benchmark's figures as a table, as JSON and as a picture."""

from typing import Any, Dict, List

from matplotlib.figure import Figure
from tabulate import tabulate

from .goals import loss_goals

_HEADERS = [
    "implementation",
    "boxes",
    "ms, median (p10-p90)",
    "x per box",
    "x fewest boxes",
    "x floor",
    "peak, U",
    "held, U",
]


def judge(run: Dict[str, Any]) -> Dict[str, Any]:
    """The run with its "goals"."""
    return {**run, "goals": [goal.json() for goal in loss_goals(run["rows"])]}


def table(run: Dict[str, Any]) -> str:
    """One judged run: a heading, a Markdown table, goals, warnings."""
    s = run["settings"]
    heading = (
        f"{s['pyramid']} pyramid, {s['size'][0]}x{s['size'][1]}, batch {s['batch']}, "
        f"{s['channels']} channels, {s['dtype']}, {s['device']}, {s['threads']} threads, "
        f"{s['rounds']} rounds, allocator: {run['allocator']}"
    )
    basis = (
        f"U = {run['unit_bytes'] / 1e6:.1f} MB, the student's maps. Copying moves "
        f"{run['copy_gb_per_s']:.1f} GB/s, so the floor (5 U) is {run['floor_ms']:.1f} ms. "
        f"All agree within {run['difference']:.0e}."
    )
    rows = [
        [
            row["implementation"],
            row["boxes"],
            f"{row['median_ms']:.1f} ({row['p10_ms']:.1f}-{row['p90_ms']:.1f})",
            f"{row['speedup']:.2f}",
            f"{row['over_fewest']:.2f}",
            f"{row['over_floor']:.1f}",
            f"{row['peak_u']:.2f}",
            f"{row['held_u']:.2f}",
        ]
        for row in run["rows"]
    ]
    cells = tabulate(rows, _HEADERS, tablefmt="github", disable_numparse=True)
    goals = "\n".join(f"goal: {goal['line']}" for goal in run["goals"])
    if (s["size"], s["batch"], s["channels"]) != ((800, 1216), 2, 256):
        goals += "\n(the goals are meant for 800x1216, batch 2, 256 channels)"
    noisy = "".join(f"\nnoisy: {reason}" for reason in run["noise"])
    return f"{heading}\n{basis}\n\n{cells}\n\n{goals}{noisy}\n"


def plot(runs: List[Dict[str, Any]]) -> Figure:
    """Per pyramid: time over boxes (dashed: the default allocator, where both ran), and memory."""
    pyramids = list(dict.fromkeys(run["settings"]["pyramid"] for run in runs))
    figure = Figure(figsize=(10, 3.6 * len(pyramids)), layout="constrained")
    axes = figure.subplots(len(pyramids), 2, squeeze=False)
    for (left, right), pyramid in zip(axes, pyramids):
        own = [run for run in runs if run["settings"]["pyramid"] == pyramid]
        for run in own:
            _plot_times(left, run, dashed=run is not own[-1])
        boxes = own[-1]["settings"]["boxes"]
        left.set(xscale="log", xlabel="boxes per image", ylabel="ms", ylim=(0, None))
        left.set_xticks(boxes, boxes)
        left.minorticks_off()
        dashes = ", dashed: default allocator" if len(own) > 1 else ""
        left.set_title(f"{pyramid}: forward and backward{dashes}", fontsize="medium")
        _plot_memory(right, own[-1])
        right.set_title(f"{pyramid}: memory", fontsize="medium")
        right.set_ylabel("times the student's maps")
        for axis in (left, right):
            axis.margins(y=0.15)
            axis.legend(fontsize="small")
    return figure


def _implementations(run: Dict[str, Any]) -> List[str]:
    return list(dict.fromkeys(row["implementation"] for row in run["rows"]))


def _of(run: Dict[str, Any], implementation: str) -> List[Dict[str, Any]]:
    return [row for row in run["rows"] if row["implementation"] == implementation]


def _plot_times(axis, run: Dict[str, Any], dashed: bool) -> None:
    for i, name in enumerate(_implementations(run)):
        rows = sorted(_of(run, name), key=lambda row: row["boxes"])
        x = [row["boxes"] for row in rows]
        style = {"color": f"C{i}", "linestyle": "--" if dashed else "-", "marker": "."}
        label = None if dashed else name
        axis.plot(x, [row["median_ms"] for row in rows], label=label, **style)
        low, high = ([row[key] for row in rows] for key in ("p10_ms", "p90_ms"))
        axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    if not dashed:
        axis.axhline(run["floor_ms"], color="0.5", linestyle=":", label="bandwidth floor")


def _plot_memory(axis, run: Dict[str, Any]) -> None:
    names = _implementations(run)
    for shift, key, label in ((-0.2, "peak_u", "peak"), (0.2, "held_u", "held for backward")):
        values = [max(row[key] for row in _of(run, name)) for name in names]
        bars = axis.bar([i + shift for i in range(len(values))], values, 0.4, label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize="small")
    axis.set_xticks(range(len(names)), names)
