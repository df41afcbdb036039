"""Markdown and HTML of a benchmark: every row, well-formed, and nothing from elsewhere."""

from html.parser import HTMLParser

import pytest

from deploy.speed.bench_page import Bar, html_page, markdown, plot, tables


def row(name, kind, batch, p50, **changes):
    return {
        **{"row": name, "kind": kind, "batch": batch, "found": 7, "repeats": 5},
        **{"p50_ms": p50, "p90_ms": p50 + 1, "p99_ms": p50 + 2, "cpu_ms": p50},
        **{"images_per_second": 1000 * batch / p50, "to_eager": None, "to_first": p50 / 10},
        **changes,
    }


def contender(name, kind, **changes):
    footprint = {"load_seconds": 0.25, "first_seconds": 0.5, "peak_mib": 90, "libraries_mib": 60}
    return {"name": name, "kind": kind, "file_mib": 1.5, "ap": None, **footprint, **changes}


def make_report(**changes):
    return {
        "machine": {
            **{"cpu": "A CPU <fast>", "available_cores": 2, "load_average": 0.1},
            "versions": {"python": "3.11", "onnxruntime": "1.2"},
        },
        **{"providers": ["CPUExecutionProvider"], "threads": 1, "warmup": 3, "repeats": 5},
        "checkpoint": None,
        "dataset": {"name": "shapes", "images": 3},
        "contenders": [
            contender("a.onnx", "graph", precision="fp32", nodes=470, ap={"AP": 44.1, "AP50": 72}),
            contender("b|<i>.onnx", "graph", precision="int8", nodes=900, peak_mib=None),
        ],
        "rows": [
            row("a.onnx", "graph", 1, 10.0),
            row("a.onnx, network only", "network", 1, 8.0, found=None),
            row("b|<i>.onnx", "graph", 1, 5.0),
            row("a.onnx", "graph", 4, 30.0),
        ],
        "left_out": [{"row": "torch.compile", "reason": "no compiler & no luck"}],
        "noisy": ["load average 9"],
        **changes,
    }


class Page(HTMLParser):
    """Collects the cells of all tables and checks that every tag is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1].append(data)


def test_the_page_holds_every_row_and_refers_to_nothing_outside():
    report = make_report()
    text = html_page(report)
    page = Page(text)
    for table in tables(report):
        for cells in (table.headers, *table.rows):
            assert cells in page.cells
    assert "http:" not in text and "https:" not in text and "//" not in text
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert any("load average 9" in words for words in page.words)
    assert page.words.count("a.onnx, network only") == 2  # in the table and in the plot


def test_tables_leave_empty_columns_out_and_missing_values_blank():
    batch1, batch4, files, left_out = tables(make_report())
    assert (batch1.title, batch4.title) == ("Batch 1", "Batch 4")
    assert [line[0] for line in batch1.rows] == ["a.onnx", "a.onnx, network only", "b|<i>.onnx"]
    assert "to Detectron2" not in batch1.headers
    assert batch1.rows[1][batch1.headers.index("found")] == "–"
    assert batch1.rows[2][batch1.headers.index("to the first graph")] == "0.50"
    assert batch4.rows[0][batch4.headers.index("images/s")] == "133.3"
    assert files.rows[0][files.headers.index("AP")] == "44.1"
    assert files.rows[1][files.headers.index("peak memory MiB")] == "–"
    assert "mask AP" not in files.headers
    assert left_out.rows == [["torch.compile", "no compiler & no luck"]]


def test_markdown_has_as_many_cells_in_every_line_of_a_table():
    text = markdown(make_report())
    assert "**Noisy, measure again:** load average 9" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 4
    for lines in blocks:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1
    assert "Noisy" not in markdown(make_report(noisy=[]))


@pytest.mark.parametrize("value, end, width", [(10.0, None, "550.0"), (5.0, 10.0, "275.0")])
def test_bars_are_as_long_as_their_values(value, end, width):
    drawing = plot("title", [Bar("a", "graph", value, end)])
    assert f'width="{width}"' in drawing and f">{value:g}<" in drawing
    assert ("<path" in drawing) == (end is not None)


def test_bars_of_nothing_are_drawn():
    assert 'width="0.0"' in plot("title", [Bar("a", "graph", 0.0)])


HOSTILE = "<img src=x onerror=a>|`b` [c](http://d)\n\n# e"


def test_names_are_shown_as_they_are_and_mean_nothing():
    report = make_report(rows=[row(HOSTILE, "graph", 1, 5.0)], noisy=[HOSTILE])
    shown = " ".join(HOSTILE.split())
    page = Page(html_page(report))
    assert shown in page.words and not {"src", "onerror"} & {name for name, _ in page.attributes}
    text = markdown(report)
    assert (
        text.count("&lt;img src=x onerror=a&gt;&#124;&#96;b&#96; &#91;c&#93;(http&#58;//d) # e")
        == 2
    )
    assert "<img" not in text and "\n# e" not in text
