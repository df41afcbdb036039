import logging

import pytest

from fgd.config import get_fgd_cfg
from fgd.engine.config_change import (
    CONTENT,
    NOTHING,
    RESULTS,
    START,
    bears_on,
    check_changes,
    continuing_changes,
    result_changes,
    training_changes,
)
from fgd.engine.config_change import (
    HARMLESS as LISTED,
)
from fgd.errors import UserError
from fgd.yaml_config import leaves, parse_yaml


def run(opts=(), **entries):
    """What a checkpoint, or the run that resumes it, says of itself."""
    cfg = get_fgd_cfg()
    cfg.merge_from_list(list(opts))
    text = entries.pop("full_config", None) or cfg.dump()
    base = {"full_config": text, "classes": ["x"], "teacher": None, "processes": 1, "iteration": 9}
    return {**base, **entries}


ALTERING = {
    "batch": ("SOLVER.IMS_PER_BATCH", 4),
    "classes": ("MODEL.RETINANET.NUM_CLASSES", 3),
    "rate": ("SOLVER.BASE_LR", 0.5),
    "size": ("INPUT.MIN_SIZE_TRAIN", (640,)),
    "data": ("DATASETS.TRAIN", ("other",)),
    "seed": ("SEED", 5),
    "average": ("SOLVER.EMA_DECAY", 0.9),
}
HARMLESS = {
    "folder": ("OUTPUT_DIR", "elsewhere"),
    "period": ("SOLVER.CHECKPOINT_PERIOD", 7),
    "kept": ("SOLVER.KEEP_CHECKPOINTS", 7),
    "best": ("SOLVER.KEEP_BEST", "bbox/AP"),
    "validation": ("DATASETS.JSON.VALID", "valid.json"),
    "evaluation": ("TEST.EVAL_PERIOD", 7),
    "test size": ("INPUT.MIN_SIZE_TEST", 640),
    "proposals": ("MODEL.RPN.POST_NMS_TOPK_TEST", 10),
    "workers": ("DATALOADER.NUM_WORKERS", 0),
    "bad images": ("DATALOADER.BAD_IMAGES", "skip"),
    "pictures": ("MODEL.DISTILLER.PICTURE_PERIOD", 7),
    "start": ("MODEL.WEIGHTS", "other.pth"),
    "longer": ("SOLVER.MAX_ITER", 90000),
    "no distillation": ("MODEL.DISTILLER.FGD.RELATION_WEIGHT", 1.0),
}


@pytest.mark.parametrize("case", ALTERING)
def test_what_alters_the_training_is_refused_with_its_key(case, caplog):
    before, now = run(), run(ALTERING[case])
    with pytest.raises(UserError, match=f"{ALTERING[case][0]}: .* -> .*--allow-config-change"):
        check_changes(before, now, allow=False)
    assert check_changes(before, now, allow=True) is True
    assert "ANOTHER training" in caplog.text and ALTERING[case][0] in caplog.text


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_not_is_only_said(case, caplog):
    caplog.set_level(logging.INFO, "fgd")
    assert check_changes(run(), run(HARMLESS[case]), allow=False) is False
    assert f"another config: {HARMLESS[case][0]}: " in caplog.text


def test_of_a_distillation_the_keys_of_its_own_methods_count():
    opts = ("MODEL.META_ARCHITECTURE", "Distiller", "MODEL.DISTILLER.METHOD", "PKD+NKD")
    keys = ["MODEL.DISTILLER.FACTOR", "MODEL.DISTILLER.NKD.TEMPERATURE"]
    other = "MODEL.DISTILLER.FGD.RELATION_WEIGHT"
    changed = [word for key in (*keys, other) for word in (key, 3.0)]
    before, now = run(opts), run((*opts, *changed))
    altering, harmless = training_changes(before, now)
    assert [x.partition(":")[0] for x in (*altering, *harmless)] == [*keys, other]
    assert len(altering) == 2
    for changes in (result_changes, continuing_changes):
        assert list(changes(before["full_config"], now["full_config"])) == keys


def test_the_same_config_is_no_change(caplog):
    assert check_changes(run(), run(), allow=False) is False and not caplog.records


def test_a_length_that_stretches_a_schedule_alters_it():
    for key, value in (
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        ("MODEL.DISTILLER.SCHEDULE.DECAY", "linear"),
    ):
        before, now = run((key, value)), run((key, value, "SOLVER.MAX_ITER", 90000))
        assert training_changes(before, now) == (["SOLVER.MAX_ITER: 40000 -> 90000"], [])


def test_another_teacher_is_one_of_other_content():
    teacher = {"weights": "a.pth", "sha256": "1" * 64}
    keys = ("MODEL.DISTILLER.TEACHER.WEIGHTS", "b.pth")
    moved = run(keys, teacher={**teacher, "weights": "b.pth"})
    altering, harmless = training_changes(run(teacher=teacher), moved)
    assert altering == [] and len(harmless) == 1
    with pytest.raises(UserError, match="content of the teacher's file: a.pth .SHA-256 11111111"):
        check_changes(
            run(teacher=teacher), run(teacher={**teacher, "sha256": "2" * 64}), allow=False
        )


def test_class_names_and_processes_count():
    with pytest.raises(UserError, match=r"classes: \['x'\] -> \['y'\]; processes: 2 -> 1"):
        check_changes(run(processes=2), run(classes=["y"]), allow=False)


def test_a_finished_run_is_not_refused(caplog):
    short = ("SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 0.5)
    assert check_changes(run(iteration=9), run(short), allow=False) is True
    assert "The finished run had another config: SOLVER.BASE_LR" in caplog.text
    with pytest.raises(UserError):
        check_changes(run(iteration=8), run(short), allow=False)


def test_a_key_that_is_new_acted_as_its_default():
    old = get_fgd_cfg()
    del old.SOLVER["OPTIMIZER"]
    before = run(full_config=old.dump())
    assert training_changes(before, run()) == ([], [])
    changed = training_changes(before, run(("SOLVER.OPTIMIZER", "AdamW")))
    assert changed == (["SOLVER.OPTIMIZER: SGD -> AdamW"], [])


DATA = {"annotations": "a", "images": "b"}


def test_images_that_were_replaced_are_said(caplog):
    before, now = run(data=DATA), run(data={**DATA, "images": "c"})
    assert check_changes(before, now, allow=False) is False
    assert "the training images are not those that the run began with" in caplog.text
    caplog.clear()
    for known in (
        run(data=DATA),
        run(data=None),
        run(),
        run(data="x"),
        run(data={"x": 1}),
    ):  # those of earlier versions say nothing
        assert check_changes(known, run(data=DATA), allow=False) is False
    assert not caplog.records


def test_training_data_may_be_moved(caplog):
    caplog.set_level(logging.INFO, "fgd")
    moved = run(("DATASETS.TRAIN", ("elsewhere",)), data=DATA)
    assert check_changes(run(data=DATA), moved, allow=False) is False
    assert "another config: DATASETS.TRAIN: " in caplog.text
    for other in ({**DATA, "annotations": "z"}, {**DATA, "annotations": ""}, None):
        before = run(data=other and {**other})
        with pytest.raises(UserError, match="DATASETS.TRAIN: "):
            check_changes(before, {**moved, "data": other and DATA}, allow=False)


def test_the_list_names_keys_that_there_are():
    keys = dict(leaves(parse_yaml(get_fgd_cfg().dump(), "config")))
    for name in LISTED:
        assert any(key == name or name.endswith(".") and key.startswith(name) for key in keys), name


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("OUTPUT_DIR", NOTHING),
        ("TEST.EVAL_PERIOD", NOTHING),
        ("TEST.DETECTIONS_PER_IMAGE", RESULTS),
        ("TEST.AUG.ENABLED", RESULTS),
        ("TEST.PRECISE_BN.ENABLED", ""),
        ("INPUT.MIN_SIZE_TEST", RESULTS),
        ("DATASETS.PROPOSAL_FILES_TEST", RESULTS),
        ("DATASETS.JSON.TEST_IMAGES", CONTENT),
        ("MODEL.WEIGHTS", START),
        ("SOLVER.BASE_LR", ""),
        ("OUTPUT_DIRX", ""),
    ],
)
def test_what_a_key_bears_on(key, kind):
    assert bears_on(key) == kind


def test_results_change_with_all_but_the_first_two_kinds():
    def changed(*opts):
        return list(result_changes(run()["full_config"], run(opts)["full_config"]))

    assert changed("OUTPUT_DIR", "x", "DATASETS.TRAIN", ("x",), "DATASETS.TEST", ("y",)) == []
    for key, value in (
        *(("MODEL.WEIGHTS", "x"), ("TEST.DETECTIONS_PER_IMAGE", 7), ("SOLVER.MAX_ITER", 9)),
        ("INPUT.MIN_SIZE_TEST", 7),
    ):
        assert changed(key, value) == [key]
