from fgd.bench.step_report import table

SETTINGS = {
    "student": "RetinaNet",
    "teacher": "none",
    "size": [64, 96],
    "batch": 2,
    "boxes": 3,
    "device": "cpu",
    "threads": 1,
    "rounds": 2,
    "amp": False,
}
TIMES = {"median_ms": 12.0, "p10_ms": 11.0, "p90_ms": 14.0}
MIB = 2**20


def method(name, needs, **figures):
    return {
        "method": name,
        "needs": needs,
        **TIMES,
        "over_parts": 1.2,
        "added_ms": 2.0,
        "goal": None,
        "no_goal": "",
        "peak_over_student_bytes": 3 * MIB // 2,
        "held_bytes": 4 * MIB,
        "held_u": 0.25,
        "parameters": 0,
        **figures,
    }


def cells_of(run):
    """Method → its cells, by header; from the wide table of the report."""
    lines = [line.split("|")[1:-1] for line in table(run).splitlines() if line.count("|") > 8]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def report_of(*methods, **more):
    parts = [{"part": "student step", **TIMES, "share": None, "peak_bytes": 5 * MIB}]
    found = {"settings": SETTINGS, "parts": parts, "methods": methods, "teachers": []}
    return {**found, "goals": [], "random_weights": [], "left_out": {}, "noise": [], **more}


def test_a_row_for_each_method():
    goal = {"bound": 1.15, "met": False, "line": "B ≤ 1.15: 1.2, MISSED"}
    run = report_of(
        method("A", ["maps", "teacher"], goal={**goal, "met": True}),
        method("B", ["region_logits", "teacher"], held_u=None, goal=goal, added_ms=-2.04),
        method("C", [], no_goal="it trains modules on maps", parameters=1234567),
        goals=[goal],
        left_out={"FGD": "there is none"},
        noise=["load 3.00"],
    )
    a, b, c = cells_of(run).values()
    assert list(a.values()) == [
        "A",
        "maps, teacher",
        "12.0 (11.0-14.0)",
        "1.20",
        "+2.0",
        "1.15, met",
        "+1.5",
        "4.0 (0.25)",
        "0",
    ]
    assert b["goal, at most"] == "1.15, MISSED" and b["held, MiB (U)"] == "4.0"
    assert b["adds, ms"] == "-2.0" and b["needs"] == "region_logits, teacher"
    assert c["needs"] == "nothing" and c["goal, at most"] == "none"
    assert c["parameters"] == "1,234,567"
    lines = table(run).splitlines()
    assert lines[0].startswith("RetinaNet, teacher none, 64x96, batch 2, 3 boxes")
    assert lines[-4:] == [
        "goal: B ≤ 1.15: 1.2, MISSED",
        "no goal: C: it trains modules on maps; 1,234,567 parameters of its own, +2.0 ms",
        "not beside them: FGD: there is none",
        "noisy: load 3.00",
    ]


def test_shares_and_the_teachers_variants_where_they_were_measured():
    several = table(report_of(method("A", [])))
    assert "share" not in several and "| teacher forward" not in several
    parts = [
        {"part": "student step", **TIMES, "share": 0.25, "peak_bytes": 5 * MIB},
        {"part": "the method and the rest", **TIMES, "share": 0.75, "peak_bytes": None},
    ]
    variant = {"precision": "bfloat16", "channels_last": True, **TIMES, "over_float32": 0.5}
    teachers = [{**variant, "change": {"a_term": None, "a_other": -0.0123}}]
    one = table(report_of(method("A", []), parts=parts, teachers=teachers))
    (row,) = [line for line in one.splitlines() if "bfloat16 channels_last" in line]
    assert [x.strip() for x in row.split("|")[3:-1]] == ["0.50", "", "-1.23%"]
    assert "| 25.0% " in one and "| 75.0% " in one and "| a_other " in one


def test_random_weights_are_said_aloud():
    text = table(report_of(method("A", []), random_weights=["teacher", "student"]))
    assert "TEACHER'S WEIGHTS ARE RANDOM" in text and "half precision" not in text
