import pytest

from fgd.errors import UserError
from fgd.study.factors import given_factors, is_measured

from .methods import method

ARMS = ["student", "FGD", "inherit+FGD", "Toy", "FGD+Toy", "inherit+distil"]


@pytest.fixture(autouse=True)
def toy():
    with method("Toy"):
        yield


def test_a_factor_is_of_an_arm_or_of_all_arms_of_a_method():
    assert given_factors("", ARMS, {}) == {}
    assert given_factors("Toy=0.5", ARMS, {}) == {"Toy": 0.5}  # FGD+Toy is another method
    assert given_factors("FGD=2", ARMS, {}) == {"FGD": 2, "inherit+FGD": 2}
    found = given_factors("inherit+FGD=1e-3,FGD=2,FGD+Toy=3", ARMS, {})
    assert found == {"FGD": 2, "inherit+FGD": 1e-3, "FGD+Toy": 3}


def test_arms_of_methods_measure_what_nobody_gave():
    given = {"FGD": 2.0}
    assert [arm for arm in ARMS if is_measured(arm, given, {})] == ARMS[2:5]
    assert not any(is_measured(arm, {}, {"MODEL.DISTILLER.FACTOR": "1.0"}) for arm in ARMS)


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("Toy", {}, "'Toy' is not NAME=NUMBER"),
        ("Toy=x", {}, "'Toy=x' is not NAME=NUMBER"),
        ("Toy=0", {}, "Toy=0: a factor is a finite number > 0"),
        ("Toy=nan", {}, "a finite number > 0"),
        ("Toy=1,Toy=2", {}, "Toy is there twice"),
        ("student=1", {}, "student is no arm of a method in --arms; there is FGD, inherit.FGD, "),
        ("inherit+distil=1", {}, "inherit.distil is no arm of a method"),
        ("Toy=1", {"MODEL.DISTILLER.FACTOR": "2.0"}, "2.0 among the options holds for every arm"),
    ],
)
def test_refusals(text, opts, message):
    with pytest.raises(UserError, match=f"--factor: .*{message}"):
        given_factors(text, ARMS, opts)


def test_a_study_without_arms_of_methods_has_no_factor_to_give():
    with pytest.raises(UserError, match="there is none"):
        given_factors("FGD=1", ["student", "distil"], {})
