import re

from fgd.study.page import html_page, markdown
from fgd.study.report import Section, change_table, mean_and_sd, number, sections, summary_table

SPREAD = {"each": [10.0, 12.0], "mean": 11.0, "sd": 1.25}
NOTHING = {"each": [None, None], "mean": None, "sd": None}


def row(arm, gap=None, **kinds):
    row = {"arm": arm, "seeds": [0, 1], "iterations": 600, "minutes": 2.5}
    return row | {kind: {"AP": ap, "APs": NOTHING, "gap closed": gap} for kind, ap in kinds.items()}


def change(arm, against, name="all classes", p=0.04):
    found = {"arm": arm, "against": against, "class": name, "seeds": [0, 1]}
    return found | {"difference": 3.5, "low": -0.25, "high": 7.0, "p": p}


def study(**more):
    rows = [row("student", bbox=SPREAD), row("distil", 25.4, bbox=SPREAD, segm=SPREAD)]
    empty = {
        "facts": ["some facts"],
        "missing": [],
        "arms": rows,
        "changes": {},
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
    assert distil[3:] == ["25", "10.0 12.0", "600", "2.5"]
    assert [line[0] for line in summary_table(study()["arms"], "segm")] == ["arm", "distil"]
    assert "gap closed, %" not in summary_table([row("student", bbox=SPREAD)], "bbox")[0]


def test_change_table():
    undefined = change("a", "b", "dog") | dict.fromkeys(
        ("difference", "low", "high", "p"), float("nan")
    )
    assert change_table([change("a", "b", "cat"), undefined])[1:] == [
        ["cat", "+3.50", "-0.25 … +7.00", "0.040"],
        ["dog", "–", "– … –", "–"],
    ]


def test_sections_tell_all_and_name_what_is_missing(tmp_path):
    changes = {"bbox": [change("a", "b"), change("a", "b", "cat"), change("c", "b")]}
    pictures = {"Losses": tmp_path / "losses.png"}
    found = sections(study(changes=changes, missing=["FAILED: x"]), pictures)
    assert [section.title for section in found] == [
        *("Study", "Missing", "AP, boxes", "AP, masks"),
        *("a against b, boxes", "c against b, boxes", "Losses"),
    ]
    assert found[1].text == ["FAILED: x"]
    assert len(found[4].table) == 3 and found[4].text == ["a test", "Mean over seeds 0, 1."]
    assert found[5].text == ["Mean over seeds 0, 1."]  # the test is explained once
    assert "Missing" not in [section.title for section in sections(study(), {})]


def test_markdown_links_pictures_and_keeps_cells_apart(tmp_path):
    text = markdown(
        [
            Section("Title", ["words"]),
            Section("Table", table=[["a", "b"], ["x|y", "1"]]),
            Section("Picture", picture=tmp_path / "p.png"),
        ]
    )
    assert text.startswith("# Title\n\nwords\n\n## Table\n") and "![Picture](p.png)" in text
    assert "x\\|y" in text


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
