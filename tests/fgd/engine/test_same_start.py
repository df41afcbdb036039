import shutil

from fgd.data.datasets import register_from_config
from fgd.engine.same_start import describe_data, describe_start, shared_values
from tests.fgd.training import training_cfg


def test_places_of_files_may_differ_and_nothing_else(tmp_path):
    cfg = training_cfg(tmp_path)
    other = cfg.clone()
    other.OUTPUT_DIR, other.DATASETS.JSON.TRAIN, other.MODEL.WEIGHTS = "x", "y", "z"
    assert shared_values(other) == shared_values(cfg)
    other.SOLVER.BASE_LR, other.INPUT.FORMAT = 7.0, "RGB"
    values = shared_values(cfg).items() ^ shared_values(other).items()
    assert {key for key, _ in values} == {"SOLVER.BASE_LR", "INPUT.FORMAT"}


def test_the_content_of_data_and_files_counts(tmp_path):
    first = training_cfg(tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "data", tmp_path / "b" / "data")
    second = training_cfg(tmp_path / "b")
    assert first.DATASETS.TRAIN != second.DATASETS.TRAIN
    assert describe_data(first) == describe_data(second)
    path = tmp_path / "b" / "data" / "data.json"
    path.write_text(path.read_text().replace("disc", "dish"))
    changed = describe_data(register_from_config(second))
    assert set(changed) == {"the data of DATASETS.TRAIN", "the data of DATASETS.TEST"}
    assert all(changed[name] != digest for name, digest in describe_data(first).items())


def test_a_training_is_told_apart_by_its_teacher_and_weights(tmp_path):
    cfg = training_cfg(tmp_path)
    header = {"classes": ["a"], "teacher": {"weights": "t.pth", "sha256": "0123456789"}}
    facts = describe_start(cfg, header)
    assert facts["the teacher's file"] == "01234567" and "MODEL.WEIGHTS" not in facts
    (tmp_path / "w.pth").write_bytes(b"1")
    (tmp_path / "t.yaml").write_text("VERSION: 2\n")
    cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE = str(tmp_path / "t.yaml")
    before = describe_start(cfg, header)
    (tmp_path / "w.pth").write_bytes(b"2")
    (tmp_path / "t.yaml").write_text("VERSION: 2\nINPUT: {FORMAT: RGB}\n")
    changed = {name for name, _ in before.items() ^ describe_start(cfg, header).items()}
    assert changed == {"MODEL.WEIGHTS", "the teacher's config"}
