import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.calculator import MAX_CHARACTERS, MAX_STEPS, calculate
from fgd.errors import UserError


def test_calculates_what_the_model_zoo_writes():
    sizes = calculate("[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64]]")
    assert sizes == [[32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]] + [
        [64, 64 * 2 ** (1 / 3), 64 * 2 ** (2 / 3)]
    ]
    assert calculate("(-1 + 2, 3 / 4)") == [1, 0.75]


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "open('x')",
        "'a' * 9",
        "[0] * 1000000000",
        "2 ** 10000000",
        "(2 ** 64) ** 64",
        "x",
        "().__class__",
        "[y for y in 3]",
        "1 / 0",
        "lambda: 0",
        "1 +",
        "-[1]",
    ],
)
def test_refuses_everything_else(expression):
    with pytest.raises(UserError):
        calculate(expression)


@pytest.mark.parametrize(
    "expression, message",
    [
        ("[x for x in " * 300 + "[1]" + "]" * 300, "3903 characters, the most is 1000"),
        (
            "[[[0 for c in [1,2,3,4,5,6,7,8,9,0]] for b in [1,2,3,4,5,6,7,8,9,0]] "
            "for a in [1,2,3,4,5,6,7,8,9,0]]",
            f"more than {MAX_STEPS} steps",
        ),
        (
            "[[y, y, y, y] for y in [[x, x, x, x] for x in [[1] for z in " + str([0] * 99) + "]]]",
            f"more than {MAX_STEPS} steps",
        ),
        ("2.0 ** 64 ", "a number as 1.8446744073709552e+19 is in no config"),
        ("2 ** 65", "the exponent 65 is beyond 64"),
        ("1e999", "a number as inf is in no config"),
        ("(-1) ** 0.5", "a number as (6.123233995736766e-17+1j) is in no config"),
        ("-" * 900 + "1", "nested too deeply"),
        ("(" * 400 + "1" + ")" * 400, "too many nested parentheses"),
    ],
)
def test_the_work_is_bounded(expression, message):
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        calculate(expression)
    assert message in str(caught.value) and len(str(caught.value)) < 200
    assert time.process_time() - start < 0.5


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="[]()0123456789.+-*/, xyforin'", max_size=MAX_CHARACTERS + 9))
def test_any_expression_is_calculated_or_one_line(expression):
    try:
        value = calculate(expression)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(value, (int, float, list))
