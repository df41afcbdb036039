import json

import pytest

from fgd.doctor.dataset import check_classes, check_data, check_teacher_classes, dropped_boxes


def test_dropped_boxes_are_counted_by_reason_for_the_datasets_of_the_run(tmp_path):
    assert dropped_boxes(str(tmp_path), ["a"]) == {}
    entry = {"annotation": 1, "image": 1, "reason": "zero area"}
    report = {
        "a": {"dropped": [entry, entry, {**entry, "reason": "outside"}]},
        "b": {"dropped": []},
    }
    (tmp_path / "data_report.json").write_text(json.dumps(report))
    assert dropped_boxes(str(tmp_path), ["a", "c"]) == {"a": {"zero area": 2, "outside": 1}}


def test_dropped_boxes_and_classes_without_boxes_are_warnings():
    clean = check_data(5, [3, 4], {}, ["cat", "dog"])
    assert (clean.verdict, clean.found) == ("ok", "5 training images, 7 boxes")
    finding = check_data(5, [3, 0], {"train": {"inverted": 2, "outside": 1}}, ["cat", "dog"])
    assert finding.verdict == "warning"
    for text in ("3 boxes of train dropped (2 inverted, 1 outside)", "no box of 1 classes (dog)"):
        assert text in finding.found


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_the_student_has_one_output_per_class(outputs):
    finding = check_classes(["cat", "dog"], outputs, "MODEL.X")
    assert finding.verdict == ("ok" if outputs == 2 else "FAULT")
    assert (finding.advice == "set MODEL.X 2") is (outputs != 2)


OURS = ["cat", "dog", "cow"]
TEACHERS = {
    "same": (OURS, 3, "ok", "the same in the teacher"),
    "spelt otherwise": (["Cat", "dog ", "COW"], 3, "ok", "the same in the teacher"),
    "one more": ([*OURS, "pig"], 4, "FAULT", "knows pig, which the dataset lacks"),
    "one fewer": (["cat", "dog"], 2, "FAULT", "the teacher does not know cow"),
    "other order": (["dog", "cat", "cow"], 3, "FAULT", "the same classes in another order"),
    "another": (["cat", "dog", "pig"], 3, "FAULT", "does not know cow and it knows pig"),
    "names unknown": ([], 3, "ok", "names unknown"),
    "names unknown, one more": ([], 4, "FAULT", "the teacher has 4 classes"),
    "names and outputs differ": (OURS, 80, "FAULT", "80 outputs for 3 classes"),
    "nothing known": ([], None, "warning", "neither names nor number"),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_classes_of_the_teacher(case):
    names, outputs, verdict, text = TEACHERS[case]
    finding = check_teacher_classes(OURS, names, outputs)
    assert finding.verdict == verdict and text in finding.found
    assert ("DOCTOR.ACCEPT" in finding.advice) is (verdict == "FAULT")
