"""Arms of pictures without labels: what each is trained on, and what the page says of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgd.config import check_config
from fgd.errors import UserError
from fgd.study.arms import study_config
from fgd.study.comparisons import pairs
from fgd.study.facts import facts
from fgd.study.labels import NO_LABELS, read_labels
from fgd.study.plan import plan

CONFIG = str(Path(__file__).parents[3] / "configs" / "quick" / "shapes_fgd_retinanet.yaml")
OPTS = {
    "DATASETS.JSON.UNLABELED_IMAGES": "photos",
    "DATALOADER.UNLABELED_PER_BATCH": "4",
    "DATASETS.JSON.TRAIN": "train.json",
    "DATASETS.JSON.TRAIN_LIMIT": "20",
}
TEACHER = {"MODEL.DISTILLER.TEACHER.WEIGHTS": "t.pth"}
ARMS = ["student", "inherit+distil", "unlabeled", "pseudo", "pseudo+distil"]
TIMED = ["unlabeled-timed", "pseudo-timed", "pseudo+distil-timed"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "labels.json"
    teacher = {"file": "t.pth", "sha256": "0123456789"}
    info = {"images": "/data", "teacher": teacher, "seconds": 61.4}
    path.write_text(json.dumps({"info": info}))
    return str(path)


def test_each_arm_has_its_pictures(file):
    arms = [*ARMS, *TIMED]
    labels = read_labels(file, arms)
    assert labels.seconds == 61.4
    runs = plan(CONFIG, "", arms, [0], Path("out"), {**OPTS, **TEACHER}, labels=labels)
    cfgs = {run.arm: study_config(CONFIG, run.opts) for run in runs[1:]}
    assert sorted(cfgs) == sorted(arms)
    for arm, cfg in cfgs.items():
        check_config(cfg)
        found = [cfg.DATASETS.JSON.UNLABELED_IMAGES, cfg.DATALOADER.UNLABELED_PER_BATCH]
        assert found == (["photos", 4] if arm.startswith("unlabeled") else ["", 0])
        data = cfg.DATASETS.JSON
        expected = (file, "/data", 0) if arm.startswith("pseudo") else ("train.json", "", 20)
        assert (data.TRAIN, data.TRAIN_IMAGES, data.TRAIN_LIMIT) == expected
        plain = arm in ("student", "pseudo", "pseudo-timed")
        assert cfg.MODEL.META_ARCHITECTURE == ("RetinaNet" if plain else "Distiller")
        assert cfg.MODEL.DISTILLER.INHERIT  # the config's own choice, as the main arm's


def test_a_config_without_such_images_has_the_options_that_it_had():
    runs = plan(CONFIG, "t.yaml", ["student"], [0], Path("out"), {})
    assert runs[1].opts == {"MODEL.META_ARCHITECTURE": "RetinaNet"}


def test_the_teacher_is_trained_with_labelled_images_alone():
    runs = plan(CONFIG, "t.yaml", ["unlabeled"], [0], Path("out"), OPTS)
    assert runs[0].opts == {"DATASETS.JSON.TRAIN": "train.json"}
    assert runs[1].needs == ("teacher",)


def test_what_they_are_compared_with():
    found = pairs(ARMS, study_config(CONFIG, OPTS))
    wanted = [(arm, "student") for arm in ARMS[1:]]
    wanted += [("unlabeled", "inherit+distil"), ("pseudo+distil", "inherit+distil")]
    assert found == [*wanted, ("pseudo+distil", "pseudo")]
    arms = ["student", "inherit+distil", "student-long", "pseudo", "pseudo-timed"]
    assert pairs(arms, study_config(CONFIG, OPTS))[4:] == [
        ("inherit+distil", "student-long"),
        ("pseudo-timed", "student-long"),
        ("pseudo-timed", "inherit+distil"),
    ]


def test_the_page_says_what_sets_them_apart(file):
    args = SimpleNamespace(
        arms=",".join(ARMS), teacher="", config_file="c.yaml", seeds="0", opts=[]
    )
    cfg = study_config(CONFIG, OPTS)
    lines = facts(args, [], cfg, {}, (), read_labels(file, ARMS))
    assert lines[1].endswith("and the seeds in common, and the data but for these:")
    assert lines[2] == (
        f"pseudo: labels of {file} by t.pth (SHA-256 01234567...); to make them took 61 s, which "
        "is in no arm's step time."
    )
    assert lines[3] == (
        "unlabeled: 4 images of photos beside each batch, which no other arm has; its steps take "
        "longer for it."
    )


@pytest.mark.parametrize(
    "arms, path, said",
    [
        (["pseudo"], "", "--arms: pseudo needs --labels, a file of deploy/label.py"),
        (["student"], "x.json", "--labels: no arm uses it; add pseudo or pseudo.distil to --arms"),
        (["pseudo"], "none.json", "--labels none.json does not exist"),
    ],
)
def test_a_file_without_an_arm_and_an_arm_without_a_file(arms, path, said):
    with pytest.raises(UserError, match=said):
        read_labels(path, arms)


def test_an_arm_without_images():
    with pytest.raises(UserError, match="--arms: unlabeled needs DATASETS.JSON.UNLABELED_IMAGES"):
        plan(CONFIG, "t.yaml", ["unlabeled"], [0], Path("out"), {}, labels=NO_LABELS)
