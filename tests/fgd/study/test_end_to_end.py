"""A study of methods and of two teachers in a row: one run fails, one is killed, files are lost."""

import json
import os
import signal
import threading
import time

import pytest

from fgd.config import load_config
from fgd.study.__main__ import main
from tests.fgd.doctor.clinic import student_cfg, train_teacher
from tests.fgd.test_jobs import processes_of

from .methods import toy_installed


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Two stages of a student that detects already; the first is also the study's config."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "site").mkdir()
    with toy_installed(folder / "site"):
        cfg = student_cfg(folder)
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # DATASETS.JSON names them
        cfg.MODEL.FPN.OUT_CHANNELS = 24
        cfg.MODEL.META_ARCHITECTURE = "Distiller"
        cfg.MODEL.WEIGHTS = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(train_teacher(folder))
        cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 50
        cfg.DOCTOR.BRIEF, cfg.DOCTOR.BATCHES = False, 1
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.BASE_LR = 4, (), 1e-4
        paths = []
        for name, method, iterations in (("b", "FGD", 9), ("a", "Toy", 4)):
            cfg.MODEL.DISTILLER.METHOD, cfg.MODEL.DISTILLER.INHERIT = method, name == "b"
            cfg.MODEL.DISTILLER.FACTOR = 1e-3
            cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = iterations, 3
            paths.insert(0, folder / f"{name}.yaml")
            paths[0].write_text(cfg.dump())
        yield paths


def kill_in_training(folder):
    """SIGKILL to the run of this folder once it has saved its first checkpoint."""
    end = time.monotonic() + 3000
    while time.monotonic() < end and not (folder / "model_0000002.pth").exists():
        time.sleep(0.002)
    for process in processes_of(f"{folder}"):
        os.kill(process, signal.SIGKILL)


def test_a_study_from_beginning_to_end(configs, tmp_path, capfd):
    first, second = configs
    (tmp_path / "inherit_0").write_text("in the way")  # so this run cannot start
    words = ["--config-file", str(first), "--output", str(tmp_path), "--resamples", "50"]
    words += ["--arms", "FGD,FGD+Toy,inherit,stages", "--factor", "FGD=0.002"]
    words += ["--stages", f"{first},{second}", "--jobs", "2", "--threads", "1"]
    stages = [tmp_path / "stages_0" / f"stage{i}" for i in (1, 2)]
    killer = threading.Thread(target=kill_in_training, args=(stages[1],))
    killer.start()
    with pytest.MonkeyPatch.context() as patch:  # pictures are drawn by the second call
        patch.setattr("fgd.study.__main__.draw", lambda *_: ({}, []))
        assert main(words) == 2  # of the first that failed
    killer.join()
    out, err = capfd.readouterr()
    assert "FAILED: inherit, seed 0: " in err and "FAILED: stages, seed 0: exit code -9" in err
    assert f"Stage 2: MODEL.DISTILLER.INHERIT True of {second} is off" in out
    done = (stages[0] / "results.json").stat().st_mtime_ns

    assert main(words) == 2  # the same again: what was killed goes on
    assert (stages[0] / "results.json").stat().st_mtime_ns == done  # stage 1 is not repeated
    log = (stages[1] / "log.txt").read_text()
    assert log.count("Starting training from iteration 0") == 1
    assert log.count("Starting training from iteration 3") == 1
    study = json.loads((tmp_path / "study.json").read_text())
    rows = {row["arm"]: row for row in study["arms"]}
    assert list(rows) == ["teacher", "FGD", "FGD+Toy", "stages"]
    (missing,) = study["missing"]
    assert missing.startswith("FAILED: inherit, seed 0: ") and "inherit_0" in missing
    check_stages(study, rows)
    check_factors(tmp_path, rows)
    check_page(tmp_path, study)
    check_losses(tmp_path, words)


def check_stages(study, rows):
    assert [rows[arm]["iterations"] for arm in rows] == [None, 4, 4, 13]
    ends = [row["end"][0]["bbox"]["AP"] for row in study["stages"]]
    assert ends[0] > 20, "vacuous: it must detect something"
    assert study["stages"][0]["start"] == [None]
    assert study["stages"][1]["start"][0]["bbox"]["AP"] == pytest.approx(ends[0])
    assert ends[1] == rows["stages"]["bbox"]["AP"]["mean"]


def check_factors(folder, rows):
    """FGD's is the given one; that of the sum was measured, and is in its config.yaml."""
    assert rows["FGD"]["factors"] == [0.002] and rows["stages"]["factors"] == [0.001]
    (measured,) = rows["FGD+Toy"]["factors"]
    recorded = load_config(str(folder / "FGD+Toy_0" / "config.yaml")).MODEL.DISTILLER
    assert measured == recorded.FACTOR and recorded.METHOD == "FGD+Toy"
    log = (folder / "FGD+Toy_0" / "log.txt").read_text()
    assert f"FACTOR {measured:g} instead of 0.001" in log


def check_page(folder, study):
    compared = [(row["arm"], row["against"], row["class"]) for row in study["changes"]["bbox"]]
    classes = ["square", "disc", "cross"]
    assert compared == [
        *(("FGD+Toy", "FGD", name) for name in ("all classes", *classes)),
        *((arm, "teacher", name) for arm in ("FGD", "FGD+Toy") for name in classes),
    ]
    page = (folder / "study.md").read_text()
    for text in (
        *("Teachers in a row, boxes", "Ranked by AP, boxes", "FGD+Toy against FGD, boxes"),
        *(
            "measured at the start of each run",
            "add the arm single-long",
            "FAILED: inherit, seed 0",
        ),
    ):
        assert text in page
    page = (folder / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 5  # AP, images, losses, attention on two images
    assert "<p>Nothing can be said yet: no arm has been tested against student.</p>" in page
    assert "model_final_onnx/model.onnx --dataset" in page


def check_losses(folder, words):
    """Damage costs what it concerns, no more; and --report trains nothing."""
    (folder / "FGD_0" / "inference" / "coco_instances_results.json").unlink()
    (folder / "FGD_0" / "model_final.pth").unlink()
    assert main([*words, "--report"]) == 0
    missing = json.loads((folder / "study.json").read_text())["missing"]
    assert missing[0] == "inherit, seed 0: not run" and len(missing) == 4
    assert missing[1].startswith("Changes between arms are not tested: FGD, seed 0: ")
    assert missing[2].startswith("Detections are not shown: FGD, seed 0: ")
    assert missing[3].startswith("Distilled maps are not shown: ") and "model_final" in missing[3]
