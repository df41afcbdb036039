import pytest

from fgd.study.headline import best_arms, headline


def change(arm, against, difference, corrected=0.01, name="all classes", seeds=(0, 1)):
    row = {"arm": arm, "against": against, "class": name, "seeds": list(seeds)}
    row |= {"difference": difference, "low": difference - 1.3, "high": difference + 1.1}
    return row | {"p": corrected, "corrected": corrected}


def rows(**seconds):
    return [
        {"arm": arm, "seconds": x, "minutes": 7.6, "iterations": 900} for arm, x in seconds.items()
    ]


FREE = "Cost at inference: none, the network is the student's."
LONGER = (
    "No student was trained for the time that distillation takes, which may explain a part of it: "
    "add the arm student-long."
)


def test_it_pays():
    compared = [
        change("FGD", "student", 13.84),
        change("student-long", "student", 9.0),
        change("FGD", "student-long", 3.61, 0.004),
        change("FGD", "student", 99.0, name="disc"),
    ]
    found = headline(rows(teacher=2.0, student=0.5, FGD=0.8), {"bbox": compared}, ["FGD"], {})
    assert found == [
        "It pays: FGD +3.6 AP (2.3 to 4.7; corrected p 0.004) over the student trained as long; "
        "+13.8 AP (12.5 to 14.9; corrected p 0.010) over the student alone.",
        "Cost in training: a step of FGD takes 1.60 times as long as the student's; training the "
        "teacher took 8 minutes more, once.",
        FREE,
    ]
    beside = {"student-long": {"seconds": {"student": 0.25, "FGD": 0.375}}}
    found = headline(rows(student=0.5, FGD=0.8), {"bbox": compared}, ["FGD"], beside)
    timed = "Cost in training: a step of FGD takes 1.50 times as long as the student's."
    assert found[1:] == [timed, FREE]  # rather than what two busy runs have logged


@pytest.mark.parametrize(
    ("difference", "corrected", "start", "end"),
    [
        (0.4, 0.2, "It does not pay, as far as this study can tell: ", ", which cannot be told "),
        (-3.0, 0.01, "It does harm: ", "; +5.0 AP (3.7 to 6.1; corrected p 0.300) over the "),
        (2.0, 0.2, "It may pay: ", ", but a comparison of its own would tell it, the 2 of this "),
        (-2.0, 0.2, "It may do harm: ", "of this page do not: take more seeds or fewer arms; +5"),
    ],
)
def test_it_does_not_pay(difference, corrected, start, end):
    compared = [change("distil", "student-long", difference, corrected)]
    compared.append(change("distil", "student", 5.0, 0.3))
    first, *others = headline(rows(student=1.0), {"bbox": compared}, ["distil"], {})
    shown = f"distil {difference:+.1f} AP ({difference - 1.3:.1f} to {difference + 1.1:.1f}"
    assert first.startswith(f"{start}{shown}; corrected p {corrected:.3f}) over the student tr")
    assert end in first and first.endswith(" over the student alone (not told apart).")
    assert others == [FREE]  # nothing is known of its steps


def test_of_several_arms_the_best_that_is_ahead_comes_first_and_all_are_named():
    compared = [
        change("DRKD", "student", -4.0),
        change("DeFeat", "student", 9.0, 0.06),
        change("PKD", "student", 5.0),
        change("FGD", "student", 7.0),
    ]
    arms = ["FGD", "PKD", "DeFeat", "DRKD", "unfinished"]
    found = headline(rows(student=1.0, FGD=1.5, PKD=1.25), {"bbox": compared}, arms, {})
    assert found == [
        "It pays: FGD +7.0 AP (5.7 to 8.1; corrected p 0.010) over the student alone.",
        "Against the student alone, ahead: FGD +7.0, PKD +5.0; not told apart: DeFeat +9.0; "
        "behind: DRKD -4.0.",
        LONGER,
        "Cost in training: a step of these arms takes 1.25 to 1.50 times as long as the student's.",
        FREE,
    ]
    assert best_arms({"bbox": compared}, arms) == ["FGD", "PKD", "DeFeat", "DRKD"]


def test_doubts_and_masks():
    boxes, masks = ([change("inherit", "student", x, seeds=[0])] for x in (2.0, 1.0))
    found = headline(rows(student=1.0, inherit=1.02), {"bbox": boxes, "segm": masks}, [], {})
    luck = "With one seed the intervals do not cover the luck of the training."
    assert found[:4] == [
        "Boxes: It pays: inherit +2.0 AP (0.7 to 3.1; corrected p 0.010) over the student alone.",
        f"Boxes: {luck}",  # it took no more time than the student
        "Masks: It pays: inherit +1.0 AP (-0.3 to 2.1; corrected p 0.010) over the student alone.",
        f"Masks: {luck}",
    ]
    nothing = ["Nothing can be said yet: no arm has been tested against student."]
    assert headline([], {}, ["FGD"], {}) == nothing
    nan = float("nan")
    assert headline([], {"bbox": [change("FGD", "student", nan, nan)]}, ["FGD"], {}) == nothing


def test_teachers_in_a_row_are_judged_by_one_of_them_for_as_long():
    compared = [change("stages", "student", 9.0), change("single-long", "student", 8.0)]
    compared.append(change("stages", "single-long", 1.0, 0.3))
    (first, *_) = headline(rows(student=1.0), {"bbox": compared}, [], {})
    assert first.startswith("It does not pay, as far as this study can tell: stages +1.0 AP")
    assert "over one teacher for as long, which cannot be told from no change; +9.0 AP" in first
