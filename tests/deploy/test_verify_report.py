import numpy as np
import pytest

from deploy.checks.matching import Decisions, Found
from deploy.checks.verify_report import Gate, Tally, VerifyReport, decide, gates_of

LINES = Decisions(score_threshold=0.05, nms_threshold=0.5, max_detections=100)


def found(*rows):
    """Rows (left, score): boxes of 20 x 20 pixels, label 0."""
    boxes = np.array([[left, 0, left + 20, 20] for left, _ in rows], np.float32).reshape(-1, 4)
    scores = np.array([score for _, score in rows], np.float32)
    return Found(boxes, scores, np.zeros(len(rows), int))


def test_tally_counts_and_measures():
    tally = Tally([0.05])
    expected = found((0, 0.9), (50, 0.7), (100, 0.4), (150, 0.0501))
    actual = found((50.002, 0.7), (0, 0.90003), (200, 0.3))
    tally.add(expected, actual, LINES)
    assert (tally.expected, tally.matched, tally.excused, tally.unmatched) == (4, 2, 1, 2)
    assert tally.ratio == 0.5 and (tally.lowest, tally.highest) == pytest.approx((0.0501, 0.9))
    assert tally.box_error == pytest.approx(0.002, rel=1e-2)
    assert tally.score_error == pytest.approx(3e-5, rel=1e-2)
    assert [text.split(":")[0] for text in tally.examples] == ["missing", "extra", "missing"]
    assert [text.endswith("excused") for text in tally.examples] == [False, False, True]


def test_gates_compare_with_twice_torchs_error_and_fail_on_nan():
    errors = {"graph": 1.9e-3, "torch": 1e-3, "scale": 1.0}
    kept = lambda **changes: gates_of(Tally(), {"x": {**errors, **changes}})[-1].kept  # noqa: E731
    assert kept() and not kept(graph=2.1e-3)
    assert kept(graph=1e-6, torch=0.0) and not kept(graph=1e-4, torch=0.0)  # rounding
    assert not kept(graph=float("nan"))


def gates(box, raw=True):
    return [
        Gate("matched", 1.0, ">= 0.995", True),
        Gate("box error (pixels)", box, "<= 0.01", box <= 0.01),
        Gate("logits.p3 to float64", 1e-5, "<= 1e-4", raw),
    ]


@pytest.mark.parametrize(
    "box,raw,verdict",
    [
        (0.009, True, "equal"),
        (0.016, True, "ill-conditioned weights"),  # noise, and float64 exonerates the graph
        (0.016, False, "the graph differs"),
        (0.009, False, "the graph differs"),
        (0.5, True, "the graph differs"),  # no noise is that large
    ],
)
def test_noise_is_told_from_faults(box, raw, verdict):
    tally = Tally([0.05], expected=100, matched=100, box_error=box, lowest=0.1, highest=0.9)
    assert decide(tally, gates(box, raw), [])[0] == verdict


@pytest.mark.parametrize("padded", [4, 3])
def test_what_only_padding_changes_is_told(padded):
    tally = Tally([0.05], 100, 96, unmatched=4, padded=padded, lowest=0.1, highest=0.9)
    verdict, explanation = decide(tally, gates(0.5, raw=False), [])
    assert verdict == "the graph differs" and ("give --filled" in explanation) == (padded == 4)


@pytest.mark.parametrize("matched,excused", [(0, 0), (19, 0), (30, 31)])
def test_too_few_matches_are_vacuous(matched, excused):
    tally = Tally([0.0], matched + excused, matched, excused, lowest=0.1, highest=0.9)
    assert decide(tally, gates(0.0), [])[0] == "vacuous"


def test_report_as_text_and_as_json():
    tally = Tally([0.05, 0.005], 40, 40, lowest=0.1, highest=0.9)
    verdict, explanation = decide(tally, gates(0.02), [])
    report = VerifyReport(verdict, explanation, 8, 30, tally, gates(0.02), {}, [], ["a warning"])
    report.gates[0].value = float("inf")
    text, data = report.table(), report.to_dict()
    assert "8 images, 30 detections; at score thresholds 0.05, 0.005 together 40" in text
    assert "FAIL" in text and "a warning" in text and text.splitlines()[-1].startswith(verdict)
    assert data["passed"] is False and data["gates"][0]["value"] == "inf"
    assert data["tally"]["matched"] == 40
