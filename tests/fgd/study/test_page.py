import html
import io
import re

import pytest

from fgd.study.classes import part_table
from fgd.study.page import html_page, markdown
from fgd.study.pictures import ap_figure
from fgd.study.report import (
    Section,
    change_table,
    comparison_table,
    each,
    mean_and_sd,
    number,
    ranked_table,
    sections,
    summary_table,
    training_table,
)
from fgd_inputs.names import one_line

SPREAD = {"each": [10.0, 12.0], "mean": 11.0, "sd": 1.25}
NOTHING = {"each": [None, None], "mean": None, "sd": None}


def row(arm, gap=None, seconds=0.5, factors=(), **kinds):
    row = {"arm": arm, "seeds": [0, 1], "iterations": 600, "minutes": 2.5}
    row |= {"seconds": seconds, "factors": list(factors)}
    return row | {kind: {"AP": ap, "APs": NOTHING, "gap closed": gap} for kind, ap in kinds.items()}


def change(arm, against, name="all classes", p=0.04, corrected=None, difference=3.5):
    found = {"arm": arm, "against": against, "class": name, "seeds": [0, 1], "p": p}
    found["corrected"] = p if corrected is None else corrected
    return found | {"difference": difference, "low": -0.25, "high": 7.0}


def study(**more):
    distil = row("distil", 25.4, 0.8, [0.5, 0.5], bbox=SPREAD, segm=SPREAD)
    rows = [row("student", bbox=SPREAD), distil]
    empty = {"headline": ["It pays."], "facts": ["some facts"], "missing": [], "arms": rows}
    empty |= {"changes": {}, "sizes": {}, "stages": [], "test": ["a test"]}
    empty["latency"] = {"points": [], "text": ["not timed"]}
    return {**empty, **more}


def test_numbers():
    assert number(1.26) == "1.3" and number(None) == number(float("nan")) == "–"
    assert number(1.0, 2, sign=True) == "+1.00" and number(-1.0, sign=True) == "-1.0"
    assert mean_and_sd(SPREAD) == "11.0 ± 1.2" and mean_and_sd(NOTHING) == "–"
    assert mean_and_sd({"mean": 3.0, "sd": None}) == "3.0"


def test_summary_table_has_no_column_without_a_figure():
    head, student, distil = summary_table(study()["arms"], "bbox")
    assert head == ["arm", "AP", "gap closed, %", "AP of each seed"]  # nothing has an APs
    assert student == ["student", "11.0 ± 1.2", "–", "10.0 12.0"]
    assert distil == ["distil", "11.0 ± 1.2", "25", "10.0 12.0"]
    assert [line[0] for line in summary_table(study()["arms"], "segm")] == ["arm", "distil"]
    (alone,) = {tuple(summary_table([row(x, bbox=SPREAD)], "bbox")[0]) for x in ("inherit", "PKD")}
    assert "gap closed, %" not in alone


def test_training_table():
    assert training_table(study()["arms"]) == [
        ["arm", "seeds", "iterations", "minutes each", "step time", "factor"],
        ["student", "0 1", "600", "2.5", "1.00", "–"],
        ["distil", "0 1", "600", "2.5", "1.60", "0.5"],
    ]
    unknown = training_table([row("student"), row("PKD", None, None)])
    assert unknown[0][-1] == "step time"
    assert unknown[2][-1] == "–"  # nothing says how long its steps take
    assert training_table([row("PKD", factors=[0.5])])[0][-2:] == ["minutes each", "factor"]


def test_factors_of_seeds():
    assert each([0.5, 0.5]) == "0.5" and each([0.31, 0.31, 0.29]) == "0.31 0.31 0.29"
    assert each([]) == "–" and each([2e-05]) == "2e-05"


def test_change_table():
    undefined = change("a", "b", "dog") | dict.fromkeys(
        ("difference", "low", "high", "p", "corrected"), float("nan")
    )
    assert change_table([change("a", "b", "cat", corrected=0.08), undefined])[1:] == [
        ["cat", "+3.50", "-0.25 … +7.00", "not told apart", "0.040", "0.080"],
        ["dog", "–", "– … –", "–", "–", "–"],
    ]
    small = {**change("a", "b"), "size": "small"}
    del small["class"]
    assert change_table([small])[1][0] == "small objects"


def test_comparison_table():
    undefined = change("a", "b") | dict.fromkeys(
        ("difference", "low", "high", "p", "corrected"), float("nan")
    )
    rows = [change("a", "b", corrected=0.12), change("c", "b", p=0.01), undefined]
    assert comparison_table(rows)[1:] == [
        ["a", "b", "+3.50", "-0.25 … +7.00", "not told apart", "0.040", "0.120"],
        ["c", "b", "+3.50", "-0.25 … +7.00", "ahead", "0.010", "0.010"],
        ["a", "b", "–", "– … –", "–", "–", "–"],
    ]


def test_ranked_table_says_what_is_told_apart_and_no_more():
    arms = [row(arm, bbox={"mean": ap, "sd": None}) for arm, ap in (("b", 3), ("a", 9), ("d", 0))]
    arms += [row("teacher", bbox=SPREAD), row("c", bbox=NOTHING), row("e", segm=SPREAD)]
    compared = [
        change("a", "b", corrected=0.2),
        change("d", "b", p=0.01, difference=-3.0),
        change("a", "d", corrected=0.05),
    ]
    assert ranked_table(arms, compared, "bbox") == [
        ["arm", "AP", "against b", "against d"],
        ["a", "9.0", "+3.5 not told apart", "+3.5 ahead"],
        ["b", "3.0", "", ""],
        ["d", "0.0", "-3.0 behind", ""],
    ]


def sized(name, **more):
    found = {**change("a", "b", **more), "size": name}
    del found["class"]
    return found


def test_sections_tell_all_and_name_what_is_missing(tmp_path):
    changes = {"bbox": [change("a", "b"), change("a", "b", "cat"), change("c", "b")]}
    nan = float("nan")
    sizes = {"bbox": [sized("small"), sized("large", p=nan, difference=nan)]}
    pictures = {"Losses": tmp_path / "losses.png", "Test images": tmp_path / "examples.png"}
    pictures["AP of each seed"] = tmp_path / "ap.png"
    found = sections(study(changes=changes, sizes=sizes, missing=["FAILED: x"]), pictures)
    assert [section.title for section in found] == [
        *("Does distillation pay?", "Test images", "AP against latency", "Missing"),
        *("How it was compared", "Ranked by AP, boxes", "AP, boxes", "AP, masks", "Training"),
        *("Comparisons of all classes, boxes", "a against b, boxes", "Losses"),
    ]
    assert found[0].text == ["It pays."] and found[0].picture == tmp_path / "ap.png"
    assert found[2].text == ["not timed"] and found[3].text == ["FAILED: x"]
    assert found[9].text == ["a test"] and len(found[9].table) == 3
    pair = found[10]
    assert [x[0] for x in pair.table] == ["class", "all classes", "cat", "small objects"]
    assert pair.folded and pair.text[0].startswith("Mean over seeds 0, 1.")
    both = sections(study(changes={"bbox": [change("a", "b")], "segm": [change("a", "b")]}), {})
    told = [section.text for section in both if section.title.startswith("Comparisons")]
    assert told == [["a test"], ()]  # the test is explained once
    assert "Missing" not in [section.title for section in sections(study(), {})]


def test_classes_and_sizes_of_teacher_student_and_arm():
    def metrics(cat, dog, small, large):
        named = {"AP-cat": cat, "AP-dog": dog, "APs": small, "APm": None, "APl": large}
        return {name: {"each": [x], "mean": x, "sd": None} for name, x in named.items()}

    rows = [row("teacher"), row("student"), row("PKD")]
    for x, values in zip(
        rows, ((60, 40, 30, 50), (30, 10, 5, 25.5), (50, 35, 20, 30)), strict=True
    ):
        x["bbox"] = metrics(*values)
    compared = [
        change("PKD", "student", "cat"),
        change("PKD", "student", "dog", corrected=0.051),
        change("PKD", "student", p=0.001),
        change("PKD", "teacher", "cat", difference=-2.0),
        change("PKD", "teacher", "dog", difference=-3.0),
    ]
    assert part_table(rows, compared, "bbox", "class")[1:] == [
        ["teacher", "–", "–", "cat 60.0", "dog 40.0", "20.0"],
        ["student", "–", "–", "cat 30.0", "dog 10.0", "20.0"],
        ["PKD", "1 of 2 (+1)", "2 of 2 (−2)", "cat 50.0", "dog 35.0", "15.0"],
    ]
    of_sizes = [{**sized("small"), "arm": "PKD", "against": "student"}]
    assert part_table(rows, of_sizes, "bbox", "size") == [
        ["arm", "differs from student (#SC)", "differs from teacher (#TC)"]
        + ["best size", "worst size", "gap"],
        ["teacher", "–", "–", "large 50.0", "small 30.0", "20.0"],
        ["student", "–", "–", "large 25.5", "small 5.0", "20.5"],
        ["PKD", "1 of 1 (+1)", "–", "large 30.0", "small 20.0", "10.0"],
    ]
    one = [row("student", bbox=SPREAD)]
    assert part_table(one, [], "bbox", "class") == part_table(one, [], "bbox", "size") == []


def test_a_teacher_far_above_does_not_press_the_students_together():
    def limits(teacher):
        arms = [row(x, bbox={"each": y, "mean": y[0]}) for x, y in (("a", [10, 12]), ("b", [20]))]
        arms.append(row("teacher", bbox={"each": [teacher], "mean": teacher}))
        (axis,) = ap_figure(arms).axes
        return axis.get_xlim(), [x.get_text() for x in (*axis.get_yticklabels(), *axis.texts)]

    (low, high), texts = limits(70.0)
    assert (low, high) == pytest.approx((9.2, 20.8)) and texts == ["teacher", "b", "a", "70.0 →"]
    (low, high), texts = limits(25.0)  # half their spread above the best
    assert (low, high) == pytest.approx((8.8, 26.2)) and texts == ["teacher", "b", "a"]
    masks = [row("a", bbox=SPREAD, segm=SPREAD)]
    assert [x.get_xlabel() for x in ap_figure(masks).axes] == ["AP, boxes", "AP, masks"]
    ap_figure([row("a", bbox=NOTHING)])


def test_markdown_links_pictures_and_keeps_cells_apart(tmp_path):
    text = markdown(
        [
            Section("Title", ["words"]),
            Section("Table", table=[["a", "b"], ["x|y", "1"]]),
            Section("Picture", picture=tmp_path / "p.png"),
        ]
    )
    assert text.startswith("# Title\n\nwords\n\n## Table\n") and "![Picture](p.png)" in text
    assert "| x&#124;y | 1" in text


def test_names_of_classes_and_files_are_shown_and_not_obeyed():
    name = "<script>a</script> $x$\n## [b](http://c) | d"
    shown = "<script>a</script> $x$ ## [b](http://c) | d"
    found = [Section(name, [name]), Section("t", table=[["class"], [name]])]
    page = markdown(found)
    assert len(page.splitlines()) == 9 and not set(page) & set("<>[]$")
    assert html.unescape(page).count(shown) == 3
    assert markdown(found, one_line).count(shown) == 3  # a terminal
    page = html_page(found)
    assert "<script" not in page and page.count(html.escape(shown)) == 4
    figure = ap_figure([row(name, bbox=SPREAD)])
    (label,) = figure.axes[0].get_yticklabels()
    assert label.get_text() == shown.replace("$", r"\$")
    figure.savefig(io.BytesIO(), format="png")


def test_html_needs_nothing_else(tmp_path):
    (tmp_path / "p.png").write_bytes(b"\x89PNG")
    page = html_page(
        [
            Section("A <b> & c", ["1 < 2"]),
            Section("T", table=[["class", "n"], ["<i>", "1"]], folded=True),
            Section("P", picture=tmp_path / "p.png"),
        ]
    )
    assert "A &lt;b&gt; &amp; c" in page and "<td>&lt;i&gt;</td>" in page and "1 &lt; 2" in page
    assert "<th>class</th>" in page and page.count("<tr>") == 2
    assert "<details><summary>T</summary><div><table>" in page and "<h2>T" not in page
    assert "white-space: nowrap" in page
    assert re.findall(r'(?:src|href)="([^"]{0,22})', page) == ["data:image/png;base64,"]
    assert "://" not in page and "<script" not in page
