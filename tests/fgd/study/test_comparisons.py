import math
from pathlib import Path

import numpy as np
import pytest

from fgd.study.arms import study_config
from fgd.study.bootstrap import ALL
from fgd.study.comparisons import correct, holm, number_of_tests, pairs, verdict

from .methods import method

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
NAN = float("nan")


@pytest.fixture(scope="module")
def cfg():
    return study_config(CONFIG, {})


@pytest.mark.parametrize(
    ("ps", "corrected"),
    [
        # By hand: the smallest of four times 4, the next times 3, then 2, then 1.
        ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),  # 0.06, 0.06 and 0.04, not falling
        ([0.04, 0.01, 0.03, 0.005], [0.06, 0.03, 0.06, 0.02]),  # in the order given
        ([0.001, 0.2, 0.4], [0.003, 0.4, 0.4]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),  # ties are equal
        ([0.02, 0.01, 0.02], [0.04, 0.03, 0.04]),
        ([0.5, 0.6, 0.9], [1.0, 1.0, 1.0]),  # never above 1
        ([0.3], [0.3]),
        ([], []),
    ],
)
def test_holm_by_hand(ps, corrected):
    assert holm(ps) == pytest.approx(corrected, abs=1e-15)


def test_holm_leaves_out_what_is_not_a_number():
    found = holm([NAN, 0.01, NAN, 0.03])
    assert math.isnan(found[0]) and math.isnan(found[2])
    assert [found[1], found[3]] == pytest.approx([0.02, 0.03])
    assert all(map(math.isnan, holm([NAN, NAN])))


def test_holm_keeps_the_order_and_lowers_nothing():
    random = np.random.default_rng(0)
    for _ in range(50):
        ps = np.round(random.random(12) ** 3, 2)
        corrected = np.array(holm(list(ps)))
        assert (corrected >= ps).all() and (corrected <= 1).all()
        order = np.argsort(ps)
        assert (np.diff(corrected[order]) >= 0).all()
        # The procedure as it is usually told: reject from the smallest on, stop at the first miss.
        rejected = 0
        while rejected < 12 and ps[order[rejected]] <= 0.05 / (12 - rejected):
            rejected += 1
        assert (corrected <= 0.05 + 1e-12).sum() == rejected


def row(p, name=ALL, difference=1.0):
    return {"arm": "a", "against": "b", "class": name, "difference": difference, "p": p}


def test_all_classes_of_boxes_and_masks_are_one_family():
    classes = [row(0.001, "disc"), row(0.03, "cross"), row(NAN, "square")]
    other = {**row(0.001, "disc"), "against": "c"}
    changes = {
        "bbox": [row(0.01), *classes, other],
        "segm": [row(0.02), row(NAN), dict(classes[0])],
    }
    found = correct(changes)
    of_boxes = [r["corrected"] for r in found["bbox"]]
    assert of_boxes[:3] == [0.02, 0.002, 0.03] and of_boxes[4] == 0.001  # pairs apart
    assert math.isnan(of_boxes[3])
    assert found["segm"][0]["corrected"] == 0.02 and math.isnan(found["segm"][1]["corrected"])
    assert number_of_tests(changes, {}) == (2, 2)
    three = {"bbox": [{**row(0.1), "class": None, "size": x} for x in "sml"]}
    assert number_of_tests(changes, three) == (2, 3) and number_of_tests({}, {}) == (0, 0)
    assert "corrected" not in changes["bbox"][0] and correct({}) == {}


def test_nothing_is_claimed_above_five_percent():
    shown = {
        (0.05, 1.0): "ahead",
        (0.05, -1.0): "behind",
        (0.051, 9.0): "not told apart",
        (0.002, 0.0): "not told apart",
    }
    for (p, difference), text in shown.items():
        assert verdict({**row(0.001, difference=difference), "corrected": p}) == text
    assert verdict({**row(NAN), "corrected": NAN}) == ""


def test_arms_are_compared_with_what_they_are_a_change_of(cfg):
    arms = ["teacher", "student", "inherit", "inherit+distil", "student-long", "no-relation"]
    assert pairs(arms, cfg) == [
        ("inherit", "student"),
        ("inherit+distil", "student"),
        ("student-long", "student"),
        ("no-relation", "student"),
        ("inherit+distil", "student-long"),
        ("no-relation", "inherit+distil"),
    ]
    cfg = study_config(CONFIG, {"MODEL.DISTILLER.INHERIT": "False"})
    assert pairs(["teacher", "distil"], cfg) == []


def test_methods_are_compared_with_students_and_with_fgd(cfg):
    with method("Toy"):
        arms = ["teacher", "student", "FGD", "Toy", "inherit+Toy", "FGD+Toy", "student-long"]
        distilled = arms[2:-1]
        assert pairs(arms, cfg) == [
            *((arm, "student") for arm in arms[2:]),
            *((arm, "student-long") for arm in distilled),
            *((arm, "FGD") for arm in ("Toy", "inherit+Toy", "FGD+Toy")),
        ]


@pytest.mark.parametrize(
    ("arms", "references"),
    [
        # One that inherits as the arm does comes first, one that names the method next.
        (["FGD", "inherit+FGD", "Toy", "inherit+Toy"], ["FGD", "inherit+FGD"]),
        (["inherit+distil", "Toy", "inherit+Toy"], ["inherit+distil", "inherit+distil"]),
        (["inherit+distil", "FGD", "Toy", "inherit+Toy"], ["FGD", "inherit+distil"]),
        (["distil", "FGD", "Toy", "inherit+Toy"], ["FGD", "FGD"]),
        (["Toy", "inherit+Toy"], []),
    ],
)
def test_the_fgd_to_compare_with(cfg, arms, references):
    with method("Toy"):
        found = dict(pairs(arms, cfg))
    assert list(found.values()) == references
    assert list(found) == ["Toy", "inherit+Toy"][: len(references)]


def test_a_main_arm_of_another_method_is_compared_with_fgd_too():
    with method("Toy"):
        cfg = study_config(CONFIG, {"MODEL.DISTILLER.METHOD": "Toy"})
        found = pairs(["inherit+distil", "inherit+FGD", "student"], cfg)
    assert ("inherit+distil", "inherit+FGD") in found and ("inherit+FGD", "inherit+distil") not in (
        found
    )
