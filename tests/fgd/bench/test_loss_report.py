import pytest

from fgd.bench.loss_report import judge, plot, table

NAMES = ("per box", "composed", "torch")


def make_run(pyramid="rcnn", allocator="kept", size=(800, 1216), noise=()):
    rows = [
        {
            "implementation": name,
            "boxes": boxes,
            "median_ms": 100.0 * (3 - i) + boxes,
            "p10_ms": 90.0 * (3 - i),
            "p90_ms": 130.0 * (3 - i) + boxes,
            "rounds_ms": [],
            "speedup": 3.25 if name == "torch" else 1.0,
            "over_fewest": 1.0 + boxes / 1000,
            "over_floor": 9.75 - i,
            "peak_u": 6.31 - 2 * i,
            "held_u": 6.02 - 3 * i,
        }
        for boxes in (1, 50, 300)
        for i, name in enumerate(NAMES)
    ]
    settings = {
        "pyramid": pyramid,
        "size": size,
        "batch": 2,
        "channels": 256,
        "boxes": (1, 50, 300),
        "rounds": 3,
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
    }
    return {
        "allocator": allocator,
        "settings": settings,
        "unit_bytes": 165_400_000,
        "copy_gb_per_s": 20.0,
        "floor_ms": 41.35,
        "difference": 3e-7,
        "rows": rows,
        "noise": list(noise),
    }


def test_the_table_has_every_figure_and_verdict():
    text = table(judge(make_run(noise=["load 3.00 left 0.0 cores for 1 threads"])))
    cells = [
        [x.strip() for x in line.split("|")] for line in text.splitlines() if "| torch" in line
    ]
    assert cells[1] == [
        "",
        "torch",
        "50",
        "150.0 (90.0-180.0)",
        *"3.25 1.05 7.8 2.31 0.02".split(),
        "",
    ]
    assert "U = 165.4 MB" in text and "20.0 GB/s" in text and "(5 U) is 41.4 ms" in text
    verdicts = [line for line in text.splitlines() if line.startswith("goal: torch")]
    assert [line.split(", ")[-1] for line in verdicts] == ["met", "MISSED", "met", "MISSED"]
    assert "noisy: load 3.00" in text and "allocator: kept" in text
    assert "meant for" not in text
    assert "meant for 800x1216" in table(judge(make_run(size=(64, 64))))


@pytest.mark.parametrize("allocators", [("kept",), ("default", "kept")])
def test_the_picture_shows_every_implementation(allocators):
    runs = [make_run(p, a) for p in ("retinanet", "rcnn") for a in allocators]
    figure = plot([judge(run) for run in runs])
    times, memory = figure.axes[:2]
    assert len(figure.axes) == 4
    assert len(times.lines) == len(NAMES) * len(allocators) + 1  # and the floor
    assert ("dashed" in times.get_title()) == (len(allocators) == 2)
    assert list(times.lines[len(NAMES) - 1].get_ydata()) == [101, 150, 400]
    assert [bar.get_height() for bar in memory.patches] == pytest.approx(
        [6.31, 4.31, 2.31, 6.02, 3.02, 0.02]
    )
    assert [label.get_text() for label in times.get_legend().get_texts()] == [
        *NAMES,
        "bandwidth floor",
    ]
