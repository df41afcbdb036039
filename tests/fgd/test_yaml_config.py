import os
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fgd.config import load_config
from fgd.errors import UserError
from fgd.yaml_config import MAX_DEPTH, MAX_VALUES, SafeCfgNode, parse_yaml


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"]
)
def test_code_in_a_config_or_its_base_is_refused_and_does_not_run(tag, tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "base.yaml").write_text(f'MODEL: {{WEIGHTS: {tag} ["touch {marker}"]}}\n')
    (tmp_path / "child.yaml").write_text("_BASE_: base.yaml\n")
    for name in ("base.yaml", "child.yaml"):
        with pytest.raises(UserError, match="base.yaml: refused"):
            SafeCfgNode.load_yaml_with_base(str(tmp_path / name))
    with pytest.raises(UserError, match="refused"):
        parse_yaml(f"X: !!python/object/apply:eval [\"open('{marker}', 'w')\"]", "text")
    assert not marker.exists()


def test_bases_merge_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text("X: {p: 1, q: 2}\nY: 1\n")
    (tmp_path / "b.yaml").write_text("X: {q: 3}\n")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nX: {r: 4}\n")
    merged = SafeCfgNode.load_yaml_with_base(str(tmp_path / "c.yaml"))
    assert merged == {"X": {"p": 1, "q": 3, "r": 4}, "Y": 1}


def test_a_base_from_the_model_zoo(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("_BASE_: model_zoo://COCO-Detection/retinanet_R_50_FPN_1x.yaml\nX: 1\n")
    merged = SafeCfgNode.load_yaml_with_base(str(path))
    assert merged["MODEL"]["RETINANET"]["IOU_THRESHOLDS"] == [0.4, 0.5] and merged["X"] == 1


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", "just text"])
def test_not_a_mapping(text):
    with pytest.raises(UserError, match="here.yaml"):
        parse_yaml(text, "here.yaml")


def test_an_empty_file_changes_nothing():
    assert parse_yaml("", "x") == {}


_LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    "text, message",
    [
        (_LAUGHS, f"line 5: it stands for more than {MAX_VALUES} values"),
        ("[" * 100_000, f"line 1: it is nested more than {MAX_DEPTH} levels deep"),
        ("a: " + "{a: " * 31, f"line 1: it is nested more than {MAX_DEPTH} levels deep"),
        ("a: &m [1, *m]", "line 1: 'm' contains itself"),
        ("a: &m\n  <<: *m", "line 2: 'm' contains itself"),
        ("a: 1" + "0" * 400, "line 1: a number of 401 digits"),
        ("a: " + "x" * 5000, "line 1: a text of 5000 characters, the most is 4096"),
        ("a: 1\na: 2", "line 2: the key 'a' occurs twice, and one would be lost"),
        ("1: 2", "line 1: the key '1' is no text"),
        ("a: !!bool maybe", """a value does not fit its tag ("'maybe'")"""),
        ("#" * 2**18 + "\n", "262145 characters, a config has at most 262144"),
    ],
)
def test_what_a_config_never_is_ends_in_one_line_at_once(text, message):
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "here.yaml")
    assert str(caught.value) == f"here.yaml: {message}"
    assert time.process_time() - start < 1


def test_merges_of_merges_count_what_they_stand_for():
    text = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{f'*a{i - 1}, ' * 9}]}}\n" for i in range(1, 9)
    )
    with pytest.raises(UserError, match=f"more than {MAX_VALUES} values"):
        parse_yaml(text, "x")


def test_bases_that_lead_in_a_circle_are_named_in_order(tmp_path):
    a, b, c = (str(tmp_path / name) for name in ("a.yaml", "b.yaml", "c.yaml"))
    for path, base in ((a, "b.yaml"), (b, "./c.yaml"), (c, a)):
        with open(path, "w") as file:
            file.write(f"_BASE_: {base}\n")
    with pytest.raises(UserError) as caught:
        load_config(a)
    chain = f"{a} -> {b} -> {tmp_path}/./c.yaml -> {a}"
    assert str(caught.value) == f"config {a}: _BASE_ leads in a circle: {chain}"


def test_bases_that_double_are_bounded(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.yaml").write_text(f"_BASE_: [{i + 1}.yaml, ./{i + 1}.yaml]\n")
    (tmp_path / "20.yaml").write_text("X: 1\n")
    with pytest.raises(UserError, match=r"0\.yaml: _BASE_ leads to more than 100 files: .* -> "):
        load_config(str(tmp_path / "0.yaml"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("_BASE_: 3", "c.yaml: _BASE_ is 3; expected a file, or several"),
        ("_BASE_: [[x]]", "c.yaml: _BASE_ is [['x']]; expected a file, or several"),
        ("_BASE_: no.yaml", "no.yaml: no such file"),
        ("_BASE_: pipe", "pipe: no such file"),
        ("_BASE_: model_zoo://no.yaml", "c.yaml: _BASE_ model_zoo://no.yaml is not in the model"),
        ("_BASE_: d2.py", "d2.py: Python code, which is never executed; give a yaml file"),
        ("VERSION: x", "c.yaml: VERSION is 'x'; expected 1 or 2"),
    ],
)
def test_bases_and_versions_that_cannot_be_read(text, message, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # which would be waited for
    (tmp_path / "d2.py").write_text("raise SystemExit")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "c.yaml"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="Python code, which is never executed"):
        load_config(str(tmp_path / "d2.py"))


def test_an_aliased_part_that_a_file_changes_is_changed_in_one_place(tmp_path):
    (tmp_path / "a.yaml").write_text("X: &x {p: 1}\nY: *x\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nX: {p: 2}\n")
    merged = SafeCfgNode.load_yaml_with_base(str(tmp_path / "b.yaml"))
    assert merged == {"X": {"p": 2}, "Y": {"p": 1}}


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_VALUES = st.recursive(
    _LEAVES,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3) | _LEAVES, x),
    max_leaves=6,
)
_KEYS = ["SOLVER", "SOLVER.STEPS", "OUTPUT_DIR", "MODEL.PIXEL_MEAN", "_BASE_", "VERSION", "NEW"]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(_KEYS), _VALUES)
def test_any_value_under_any_key_is_taken_or_one_line(tmp_path_factory, key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(value))
    try:
        load_config(str(path))
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and "any.yaml" in str(error)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=" \n-:[]{}&*!#|>?'\"%@`,ab1<", max_size=60))
def test_any_text_is_a_mapping_or_one_line(text):
    try:
        assert type(parse_yaml(text, "x.yaml")) is dict
    except UserError as error:
        assert str(error).startswith("x.yaml: ") and "\n" not in str(error)
