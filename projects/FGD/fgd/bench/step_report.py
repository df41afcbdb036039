"""The step benchmark's figures as tables."""

from typing import Any, Dict, List, Optional, Sequence

from tabulate import tabulate

from .step import variant_title

_SPREAD = "ms, median (p10-p90)"
_METHOD = [
    "method",
    "needs",
    _SPREAD,
    "x (student + teacher)",
    "adds, ms",
    "goal, at most",
    "peak over the student's, MiB",
    "held, MiB (U)",
    "parameters",
]
_HELD = (
    "Held is what the forward leaves for the backward beyond the student's own, the teacher's maps "
    "included where they are read again. U: the student's maps that the method distils."
)


def table(run: Dict[str, Any]) -> str:
    """The run as Markdown tables, goals and warnings."""
    s = run["settings"]
    heading = (
        f"{s['student']}, teacher {s['teacher']}, {s['size'][0]}x{s['size'][1]}, batch "
        f"{s['batch']}, {s['boxes']} boxes, {s['device']}, {s['threads']} threads, {s['rounds']} "
        f"rounds, AMP {s['amp']}. A step is forward, backward, clipping and optimizer."
    )
    tables = [_parts(run["parts"]), f"{_methods(run['methods'])}\n\n{_HELD}"]
    if run["teachers"]:
        tables.append(_teachers(run["teachers"]))
    lines = [
        *(f"goal: {goal['line']}" for goal in run["goals"]),
        *(_no_goal(row) for row in run["methods"] if row["no_goal"]),
        *(f"not beside them: {name}: {reason}" for name, reason in run["left_out"].items()),
        *(f"noisy: {reason}" for reason in run["noise"]),
    ]
    body = "\n\n".join([*tables, "\n".join(lines)])
    return f"{heading}{_loud(run)}\n\n{body}\n"


def _loud(run: Dict[str, Any]) -> str:
    loud = "".join(
        f"\nNOTE: the {who.upper()}'S WEIGHTS ARE RANDOM, not those of the config. Times do not "
        "depend on that."
        for who in run["random_weights"]
    )
    if "teacher" in run["random_weights"] and run["teachers"]:
        loud += (
            "\nNOTE: how half precision changes the terms is measured with trained teachers "
            "only: give MODEL.DISTILLER.TEACHER.WEIGHTS a local file."
        )
    return loud


def _parts(parts: Sequence[Dict[str, Any]]) -> str:
    """Without shares where the whole is not one method's."""
    rows = [
        {
            "part": part["part"],
            _SPREAD: _spread(part),
            **({} if part["share"] is None else {"share of the whole": f"{part['share']:.1%}"}),
            "peak extra memory, MiB": (
                "" if part["peak_bytes"] is None else f"{part['peak_bytes'] / 2**20:.0f}"
            ),
        }
        for part in parts
    ]
    return _markdown([[*row.values()] for row in rows], [*rows[0]])


def _methods(methods: Sequence[Dict[str, Any]]) -> str:
    rows = [
        [
            row["method"],
            ", ".join(row["needs"]) or "nothing",
            _spread(row),
            f"{row['over_parts']:.2f}",
            f"{row['added_ms']:+.1f}",
            _verdict(row["goal"]),
            f"{row['peak_over_student_bytes'] / 2**20:+.1f}",
            _held(row["held_bytes"], row["held_u"]),
            f"{row['parameters']:,}",
        ]
        for row in methods
    ]
    return _markdown(rows, _METHOD)


def _verdict(goal: Optional[Dict[str, Any]]) -> str:
    return "none" if goal is None else f"{goal['bound']:g}, {'met' if goal['met'] else 'MISSED'}"


def _held(held: int, units: Optional[float]) -> str:
    return f"{held / 2**20:.1f}" + ("" if units is None else f" ({units:.2f})")


def _no_goal(row: Dict[str, Any]) -> str:
    return (
        f"no goal: {row['method']}: {row['no_goal']}; {row['parameters']:,} parameters of its own, "
        f"{row['added_ms']:+.1f} ms"
    )


def _teachers(teachers: Sequence[Dict[str, Any]]) -> str:
    rows = [
        [
            variant_title(row["precision"], row["channels_last"]),
            _spread(row),
            f"{row['over_float32']:.2f}",
            *("" if x is None else f"{x:+.2%}" for x in row["change"].values()),
        ]
        for row in teachers
    ]
    return _markdown(rows, ["teacher forward", _SPREAD, "x float32", *teachers[0]["change"]])


def _markdown(rows: List[list], headers: List[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _spread(row: Dict[str, Any]) -> str:
    return f"{row['median_ms']:.1f} ({row['p10_ms']:.1f}-{row['p90_ms']:.1f})"
