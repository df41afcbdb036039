import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgd_inputs.classes import class_positions
from fgd_inputs.errors import UserError


@given(st.permutations(["circle", "triangle", "square", "a\nb", ""]))
def test_any_order_is_matched_by_name(dataset):
    model = ["circle", "triangle", "square", "a\nb", ""]
    positions = class_positions(model, dataset, "x")
    assert [dataset[i] for i in positions] == model


@pytest.mark.parametrize(
    "model, dataset, found",
    [
        (["a", "b"], ["a", "c"], "only in the model ['b'], only in the dataset ['c'], 2 in the"),
        (
            ["a", "b"],
            ["a"],
            "only in the model ['b'], only in the dataset [], 2 in the model, 1 in",
        ),
        (
            ["a"],
            ["a", "b"],
            "only in the model [], only in the dataset ['b'], 1 in the model, 2 in",
        ),
        (["a", "a"], ["a"], "only in the dataset [], 2 in the model, 1 in the dataset"),
        (["a", "b"], ["a", "b", "b"], "2 in the model, 3 in the dataset"),
        ([], ["a"], "only in the dataset ['a']"),
    ],
)
def test_other_names_are_refused(model, dataset, found):
    with pytest.raises(UserError) as caught:
        class_positions(model, dataset, "t.json")
    assert "classes of the model and of t.json differ: " in str(caught.value)
    assert found in str(caught.value)
