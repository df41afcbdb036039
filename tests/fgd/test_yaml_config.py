import pytest

from fgd.errors import UserError
from fgd.yaml_config import SafeCfgNode, calculate, parse_yaml


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
