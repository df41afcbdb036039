import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fgd.checkpoint_entries import FORMAT, check_entries
from fgd.errors import UserError
from fgd.weights import load_complete, read_weights

_WEIGHT = {"head.weight": torch.ones(2, 3), "head.bias": torch.ones(2)}
_DTYPES = "weights are of float16, bfloat16, float32 or float64, in this machine's byte order"
_OWN = {
    "format": FORMAT,
    "classes": ["a", "b"],
    "iteration": 3,
    "config": "VERSION: 2",
    "full_config": "VERSION: 2",
    "teacher": {"weights": "t.pth", "sha256": "00"},
    "distiller": {},
    "raw": {"head.bias": torch.zeros(2)},
    "best": {"metric": "bbox/AP", "figure": 0.5, "iteration": 3, "images": "00"},
    "trainer": {"optimizer": {0: {"momentum": torch.zeros(2)}}},
    "rng": [],
}


def make_model():
    model = nn.Module()
    model.head = nn.Linear(3, 2)
    model.register_buffer("table", torch.arange(4))
    return model


def saved(tmp_path, content):
    path = tmp_path / "m.pth"
    torch.save(content, path)
    return str(path)


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_weights(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "dtype", "int8 uint8 int16 uint16 bool complex64 float8_e4m3fn uint64".split()
)
def test_tensors_that_are_no_weights_are_refused_by_name(dtype, tmp_path):
    weights = {**_WEIGHT, "head.bias": torch.zeros(2).to(getattr(torch, dtype))}
    for content in (weights, {"model": weights, "iteration": 3}):
        message = refusal(saved(tmp_path, content))
        assert message == f"'head.bias' is of {dtype}; {_DTYPES}. Convert the file"


@pytest.mark.parametrize("dtype", [">f4", "f16", "O", "M8[s]", "i1", "?", "c8", "U2", "f4,f4"])
def test_odd_arrays_of_a_pickle_are_refused_by_name(dtype, tmp_path):
    path = tmp_path / "m.pkl"
    weights = {"a": np.zeros(2, "f4"), "b": np.zeros(2, dtype)}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "x"}, protocol=5))
    message = refusal(str(path))
    assert message.startswith("'b' is of ") and _DTYPES in message


@pytest.mark.parametrize(
    "content, message",
    [
        ({3: torch.ones(1)}, "the name of a weight is 3; expected a text"),
        ({"model": {3: torch.ones(1)}}, "the name of a weight is 3; expected a text"),
        ({"model": _WEIGHT, 3: 4}, "the name of a part is 3; expected a text"),
        ({"model": _WEIGHT, "classes": "abc"}, "its entry 'classes' is 'abc'; expected a list"),
        ({"model": _WEIGHT, "classes": ["a", 1]}, "its entry 'classes' is ['a', 1]; expected a"),
        ({"model": _WEIGHT, "classes": {"a": 1}}, "its entry 'classes' is {'a': 1}; expected a"),
        ({"model": _WEIGHT, "iteration": "9"}, "its entry 'iteration' is '9'; expected a whole"),
        ({"model": _WEIGHT, "iteration": 2.5}, "its entry 'iteration' is 2.5; expected a whole"),
        ({"model": _WEIGHT, "iteration": True}, "its entry 'iteration' is True; expected a whole"),
        ({"model": _WEIGHT, "iteration": 10**30}, "its entry 'iteration' is 1000"),
        ({"model": _WEIGHT, "format": 7}, "its entry 'format' is 7; expected a text"),
        ({"model": {}}, "it holds no weights"),
        ({"model": [1]}, "it holds no weights"),
        ({"model": {"a": torch.ones(2).to_sparse()}}, "'a' is no plain tensor (torch.sparse_coo"),
        ({"model": {"a": torch.ones(2, device="meta")}}, "'a' is no plain tensor ("),
    ],
)
def test_entries_of_another_type_are_named(content, message, tmp_path):
    assert refusal(saved(tmp_path, content)).startswith(message)


@pytest.mark.parametrize("name", sorted(set(_OWN) - {"format"}))
@pytest.mark.parametrize("value", [7.5, [["x"]], {"x": {}}])
def test_all_entries_of_this_projects_format_are_looked_at(name, value):
    check_entries({"model": _WEIGHT, **_OWN})
    if (name, type(value)) in (("trainer", dict), ("rng", list)):  # looked at where they are used
        return
    with pytest.raises(
        UserError, match=f"{name}|'x' is a" if name in ("distiller", "raw") else name
    ):
        check_entries({"model": _WEIGHT, **_OWN, name: value})


@pytest.mark.parametrize(
    "entry", [{"figure": float("nan")}, {"iteration": True}, {"metric": 3}, {"images": 3}]
)
def test_a_best_checkpoint_says_by_which_figure(entry):
    with pytest.raises(UserError, match="its entry 'best' is .* a dict of metric, figure and iter"):
        check_entries({"model": _WEIGHT, **_OWN, "best": {**_OWN["best"], **entry}})


def test_content_without_end_is_refused(tmp_path):
    circle = [torch.ones(1)]
    circle.append(circle)
    bomb = ["x"]
    for _ in range(30):
        bomb = [bomb, bomb]
    assert "50 levels deep, or contains itself" in refusal(
        saved(tmp_path, {"model": _WEIGHT, "extra": circle})
    )
    assert refusal(saved(tmp_path, {"model": _WEIGHT, "extra": bomb})) == (
        "it stands for more than 2000000 values"
    )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_integers_do_not_become_weights_nor_fractions_tables(prefix, tmp_path):
    whole = {f"{prefix}{k}": v for k, v in make_model().state_dict().items()}
    load_complete(make_model(), saved(tmp_path, whole))
    for name, value, message in (
        ("head.bias", torch.tensor([1, 2]), "'{}' is of int64 in the file, of float32 in the"),
        ("table", torch.zeros(4), "'{}' is of float32 in the file, of int64 in the model"),
    ):
        path = saved(tmp_path, {**whole, f"{prefix}{name}": value})
        with pytest.raises(UserError) as caught:
            load_complete(make_model(), path)
        assert message.format(f"{prefix}{name}") in str(caught.value)


def test_half_precision_weights_are_taken(tmp_path):
    model = make_model()
    content = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    assert load_complete(model, saved(tmp_path, content)).loaded == 3


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=2), x, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*_OWN, "model", "new"]), _VALUES))
def test_any_value_in_any_entry_is_taken_or_one_line(entries):
    try:
        check_entries({"model": _WEIGHT, **_OWN, **entries})
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 300
