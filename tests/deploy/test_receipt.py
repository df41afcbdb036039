import hashlib

import pytest

from deploy.receipt import (
    NO_TEACHER,
    NOT_RECORDED,
    chain,
    environment,
    origin_of,
    which_checkpoint,
)
from deploy.serving.engine import Engine

TEACHER = {"weights": "output/teacher/model_final.pth", "sha256": "ab" * 32}


def test_a_distilled_run_is_traced_back():
    origin = origin_of({"teacher": TEACHER, "full_config": "A: 1\n", "iteration": 599})
    config = hashlib.sha256(b"A: 1\n").hexdigest()
    made = chain(origin, {"checkpoint_sha256": "c", "graph_sha256": "g"})
    assert list(made) == ["teacher", "training_config", "checkpoint", "graph"]
    assert made == {
        "teacher": TEACHER,
        "training_config": {"sha256": config},
        "checkpoint": {"sha256": "c", "iterations": 600},
        "graph": {"sha256": "g"},
    }


def test_a_student_without_teacher_says_so():
    assert origin_of({"teacher": None})["teacher"] == NO_TEACHER


@pytest.mark.parametrize("content", [{}, {"teacher": 7, "full_config": {}, "iteration": "many"}])
def test_what_older_and_foreign_files_lack_is_not_recorded(content):
    assert origin_of({"model": {}, **content}) == {
        "teacher": NOT_RECORDED,
        "training_config_sha256": NOT_RECORDED,
        "iterations": None,
    }
    assert origin_of({"teacher": {"weights": "t.pth"}})["teacher"]["sha256"] == NOT_RECORDED


def test_the_best_checkpoint_of_a_run_says_its_iteration_and_figure():
    best = {"metric": "bbox/AP", "figure": 43.218, "iteration": 599, "images": "0"}
    origin = origin_of({"format": "fgd-1", "iteration": 599, "best": best})
    made = chain(origin, {"checkpoint_sha256": "c", "graph_sha256": "g"})["checkpoint"]
    assert made == {"sha256": "c", "iterations": 600, "best": {"bbox/AP": 43.218}}
    text = "after 600 iterations, the best of its run, bbox/AP 43.22"
    assert which_checkpoint(origin) == text
    assert which_checkpoint(origin_of({"iteration": 599})) == "after 600 iterations"
    assert which_checkpoint(origin_of({"best": 0.5})) == "iterations not recorded"  # anyone's


def test_environment_names_what_judged_the_graph():
    found = environment(
        {"torch": "2.11.0"}, [Engine("onnxruntime", "1.31.1"), Engine("openvino", "9")]
    )
    assert found.pop("python")[0] == "3"
    assert found == {"torch": "2.11.0", "onnxruntime": "1.31.1", "openvino": "9"}
