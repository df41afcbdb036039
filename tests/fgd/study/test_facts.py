from argparse import Namespace
from pathlib import Path

from fgd.study.arms import study_config
from fgd.study.facts import facts, how_tested, time_facts
from fgd.study.plan import plan

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
MEASURED = {
    "arm": "inherit+FGD",
    "seconds": {"student": 0.5, "FGD": 0.8, "inherit+FGD": 1.0},
    "ratio": 2.0,
    "iterations": 1200,
}


def test_it_says_whose_time_the_long_student_had_and_who_had_less():
    first, second = time_facts({"student-long": MEASURED})
    assert "1200 iterations, 2.00 times as many, as fit into the time of inherit+FGD (" in first
    assert "FGD 0.800 s" in first and "labels" not in first
    assert second == (
        "Step time of the other arms over that of inherit+FGD: FGD 0.80. Below 1 an arm had less "
        "time than student-long."
    )
    timed = {**MEASURED, "labelling": 61.4}
    (line,) = time_facts({"pseudo-timed": timed})
    assert "time of inherit+FGD, less 61 s for making the labels (" in line
    assert time_facts({}) == []


def test_it_names_the_arms_that_measured_their_factor():
    args = Namespace(config_file=CONFIG, teacher="t.yaml", seeds="0", opts=[], arms="FGD")
    cfg = study_config(CONFIG, {})
    for arms, text in (
        (["FGD", "inherit+FGD"], "FACTOR of FGD, inherit+FGD was"),
        (["distil"], ""),
    ):
        runs = plan(CONFIG, "t.yaml", arms, [0, 1], Path("out"), {})
        found = " ".join(facts(args, runs, cfg, {}))
        assert text in found and ("--balance" in found) == bool(text)
        assert "600 iterations of 16 images" in found and "teacher t.yaml" in found


def test_it_says_when_there_are_too_many_comparisons_to_show_anything():
    (text,) = how_tested(1000, 25)  # 25 x 2/1001 is just below 0.05
    assert "over the 25 comparisons of all classes" in text and "at least 0.002." in text
    assert "for single classes or sizes over those of the two arms" in text
    assert how_tested(1000, 2, 26)[1] == how_tested(1000, 26)[1]  # the larger number counts
    _, warning = how_tested(1000, 26)
    assert "at least 0.0519" in warning and "--resamples 1039 or more" in warning
    assert len(how_tested(1039, 26)) == 1 and len(how_tested(1038, 26)) == 2
    assert "at least 1.000" not in how_tested(1, 1)[1] and "is at least 1," in how_tested(1, 1)[1]
