import html
import io
import re

from fgd.study.classes import class_table
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
    empty = {
        "facts": ["some facts"],
        "missing": [],
        "arms": rows,
        "changes": {},
        "stages": [],
        "test": ["a test"],
    }
    return {**empty, **more}


def test_numbers():
    assert number(1.26) == "1.3" and number(None) == number(float("nan")) == "–"
    assert number(1.0, 2, sign=True) == "+1.00" and number(-1.0, sign=True) == "-1.0"
    assert mean_and_sd(SPREAD) == "11.0 ± 1.2" and mean_and_sd(NOTHING) == "–"
    assert mean_and_sd({"mean": 3.0, "sd": None}) == "3.0"


def test_summary_table():
    head, student, distil = summary_table(study()["arms"], "bbox")
    assert head == [*("arm", "AP", "APs", "gap closed, %"), *head[4:]]
    assert student[:4] == ["student", "11.0 ± 1.2", "–", "–"]
    assert head[-4:] == ["factor", "iterations", "minutes each", "step time"]
    assert distil[3:] == ["25", "10.0 12.0", "0.5", "600", "2.5", "1.60"]
    assert student[5:] == ["–", "600", "2.5", "1.00"]
    assert [line[0] for line in summary_table(study()["arms"], "segm")] == ["arm", "distil"]
    (alone,) = {tuple(summary_table([row(x, bbox=SPREAD)], "bbox")[0]) for x in ("inherit", "PKD")}
    assert not {"gap closed, %", "factor", "step time"} & set(alone)
    unknown = summary_table(
        [row("student", bbox=SPREAD), row("PKD", None, None, bbox=SPREAD)], "bbox"
    )
    assert unknown[2][-1] == "–"  # nothing says how long its steps take


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


def test_sections_tell_all_and_name_what_is_missing(tmp_path):
    changes = {"bbox": [change("a", "b"), change("a", "b", "cat"), change("c", "b")]}
    pictures = {"Losses": tmp_path / "losses.png"}
    found = sections(study(changes=changes, missing=["FAILED: x"]), pictures)
    assert [section.title for section in found] == [
        *("Study", "Missing", "AP, boxes", "AP, masks", "Ranked by AP, boxes"),
        *("Comparisons of all classes, boxes", "a against b, boxes", "Losses"),
    ]
    assert found[1].text == ["FAILED: x"]
    assert found[5].text == ["a test"] and len(found[5].table) == 3
    assert len(found[6].table) == 3 and found[6].text[0].startswith("Mean over seeds 0, 1.")
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
    assert class_table(rows, compared, "bbox")[1:] == [
        ["teacher", "–", "–", "cat 60.0", "dog 40.0", "20.0", "20.0"],
        ["student", "–", "–", "cat 30.0", "dog 10.0", "20.0", "20.5"],
        ["PKD", "1 of 2 (+1)", "2 of 2 (−2)", "cat 50.0", "dog 35.0", "15.0", "10.0"],
    ]
    assert class_table([row("student", bbox=SPREAD)], [], "bbox") == []  # one class


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
            Section("T", table=[["class", "n"], ["<i>", "1"]]),
            Section("P", picture=tmp_path / "p.png"),
        ]
    )
    assert "A &lt;b&gt; &amp; c" in page and "<td>&lt;i&gt;</td>" in page and "1 &lt; 2" in page
    assert "<th>class</th>" in page and page.count("<tr>") == 2
    assert re.findall(r'(?:src|href)="([^"]{0,22})', page) == ["data:image/png;base64,"]
    assert "://" not in page and "<script" not in page
