import pytest

from fgd.doctor.dataset import check_classes, check_data, check_teacher_classes
from fgd_inputs.coco import CocoFile


def coco_file(dropped=(), warnings=()):
    entries = [{"annotation": i, "image": 1, "reason": x} for i, x in enumerate(dropped)]
    return CocoFile("x.json", [], [], dropped=entries, warnings=list(warnings))


def records(*labels, crowds=()):
    """An image with an object of each label, and one with a crowd region of each."""
    entries = [
        [{"category_id": x, "iscrowd": flag} for x in own]
        for flag, own in enumerate((labels, crowds))
    ]
    return [{"annotations": own} for own in entries]


def test_boxes_are_counted_crowds_beside_them():
    clean = check_data(records(0, 1, 1), ["cat", "dog"], {"a": coco_file()})
    assert (clean.verdict, clean.found) == ("ok", "2 training images, 3 boxes")
    crowds = check_data(records(0, 1, crowds=[1, 1]), ["cat", "dog"], {})
    assert crowds.found == "2 training images, 4 boxes, 2 of them crowd regions"
    only = check_data(records(0, crowds=[1]), ["cat", "dog"], {})
    assert only.verdict == "warning"
    assert only.found.endswith("; no box but crowd regions of 1 classes (dog)")


def test_what_the_reader_drops_and_suspects_is_a_warning():
    files = {
        "train": coco_file(["inverted", "outside", "inverted"]),
        "test": coco_file(warnings=["5 of 9 boxes look like corners"]),
    }
    finding = check_data(records(0), ["cat", "dog\n<b>"], files, "all 3 test images are in both")
    assert finding.verdict == "warning"
    assert finding.found.split("; ") == [
        "2 training images, 1 boxes",
        "train: 3 boxes dropped (2 inverted, 1 outside)",
        "test: 5 of 9 boxes look like corners",
        "no box of 1 classes (dog <b>)",
        "all 3 test images are in both",
    ]
    assert finding.advice.split("; ") == [
        "write boxes as x, y, width, height in pixels",
        "dropped boxes are listed in data_report.json",
        "check the category ids of the JSON",
        "test on images that are not trained on",
    ]


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
