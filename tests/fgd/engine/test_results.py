"""results.json: read as it is or refused, and of which checkpoint and data it is."""

import json

import pytest

from fgd.engine.results import evaluated_otherwise, read_results, without_ap
from fgd.errors import UserError
from fgd.weights import weights_sha256

BOX = {"bbox": {"AP": 12.5, "APs": None}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty \(0 bytes\); without that file the run is evaluated again"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "this is no results.json of a run; delete it"),
        ("{}", "this is no results.json of a run; delete it"),
        ('{"iteration": null, "bbox": {"AP": "x"}}', "bbox AP is 'x'; expected a number or null"),
        ('{"iteration": null, "bbox": {"AP": NaN}}', "bbox AP is nan; expected a number or null"),
        ('{"iteration": null, "a": {"bbox": {"AP": 1e999}}}', "a bbox AP is inf; expected"),
        ('{"iteration": [], "bbox": {"AP": 1}}', r"iteration is \[\]; expected a number or null"),
        ('{"iteration": 1, "evaluated": 3}', "evaluated is 3; delete it"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_results(str(path))


def test_results_belong_to_a_checkpoint_and_to_test_data(tmp_path):
    weights = tmp_path / "model_final.pth"
    weights.write_bytes(b"one")
    tested = {"annotations": "a", "images": "b"}
    evaluated = {"weights": weights_sha256(str(weights)), **tested}
    found = {"iteration": 3, "evaluated": evaluated, **BOX}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(found))
    assert read_results(str(path)) == found
    assert evaluated_otherwise(found, str(weights), tested) == ""
    other = evaluated_otherwise(found, str(weights), {**tested, "images": "c"})
    assert other == "is of other test data (images differ)"
    weights.write_bytes(b"another")
    assert "is of another checkpoint than" in evaluated_otherwise(found, str(weights), tested)
    weights.unlink()  # whoever needs the room deletes it
    assert evaluated_otherwise(found, str(weights), tested) == ""


def test_results_of_earlier_versions_are_believed(tmp_path):
    (tmp_path / "model_final.pth").write_bytes(b"any")
    found = {"iteration": 3, **BOX}
    weights = str(tmp_path / "model_final.pth")
    assert evaluated_otherwise(found, weights, {"annotations": "a", "images": "b"}) == ""


def test_what_has_no_ap_is_named():
    none = {"bbox": {"AP": None}, "segm": {"AP": 0.0}}
    assert without_ap({"iteration": 1, **none, "evaluated": {"weights": ""}}) == ["bbox"]
    assert without_ap({"iteration": 1, "one": none, "two": BOX}) == ["one bbox"]
