import json

import pytest

from fgd.engine.evaluation import average_precisions, check_same_ap
from fgd.errors import UserError

BOX = {"iteration": 5, "bbox": {"AP": 40.0, "AP50": 60.0}}
MASKS = {**BOX, "segm": {"AP": 35.0}}


@pytest.fixture
def results(tmp_path):
    def write(content):
        (tmp_path / "results.json").write_text(json.dumps(content))
        return str(tmp_path / "results.json")

    return write


def test_every_ap_of_a_results_file():
    assert average_precisions(MASKS) == {"bbox AP": 40.0, "segm AP": 35.0}
    assert average_precisions({"iteration": None, "bbox": {"AP": None}}) == {"bbox AP": 0.0}
    sets = {"iteration": 1, "a": {"bbox": {"AP": 1.0}}, "b": {"bbox": {"AP": 2.0}}}
    assert average_precisions(sets) == {"a bbox AP": 1.0, "b bbox AP": 2.0}


def test_the_same_ap_up_to_rounding(results):
    check_same_ap({"bbox": {"AP": 40.04, "AP50": 0.0}}, results(BOX))
    check_same_ap({"bbox": {"AP": None}}, results({"iteration": 5, "bbox": {"AP": None}}))
    check_same_ap(MASKS, results(MASKS))


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        ({"bbox": {"AP": 39.9}}, BOX, "starts with bbox AP 39.90, but .*results.json says 40.00"),
        ({"bbox": {"AP": None}}, BOX, "starts with bbox AP 0.00"),
        ({**BOX, "segm": {"AP": 30.0}}, MASKS, "starts with segm AP 30.00"),
        (BOX, MASKS, "evaluated are bbox AP here, bbox AP, segm AP there"),
        ({"iteration": 1}, {"iteration": 1}, "evaluated are nothing here, nothing there"),
    ],
)
def test_another_ap_is_refused(results, found, expected, message):
    with pytest.raises(UserError, match=message):
        check_same_ap(found, results(expected))


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match="--starts-as: results .*/results.json does not exist"):
        check_same_ap(BOX, str(tmp_path / "results.json"))
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="--starts-as: results .*/results.json is not JSON"):
        check_same_ap(BOX, str(tmp_path / "results.json"))
