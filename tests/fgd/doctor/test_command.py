"""--doctor, the brief check before step one, and --balance, through the command's main."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from fgd import cli
from fgd.config import load_config, load_config_text
from fgd.distillation import taps
from fgd.doctor.settings import CHECKS
from fgd.engine import solver

from .clinic import CLASSES, distilled_cfg, save_teacher, write_config


def run(capfd, cfg, folder, *argv):
    """Exit code of the command, its stderr, and doctor.json if there is one."""
    capfd.readouterr()
    path = write_config(cfg, folder / "config.yaml")
    code = cli.main(["--config-file", str(path), *argv])
    report = Path(cfg.OUTPUT_DIR, "doctor.json")
    content = json.loads(report.read_text()) if report.exists() else None
    return code, capfd.readouterr().err, content


def verdicts(report):
    return {finding["name"]: finding["verdict"] for finding in report["findings"]}


def test_a_healthy_run_has_no_fault(teacher, tmp_path, capfd):
    cfg = distilled_cfg(tmp_path, teacher[1])
    code, error, report = run(capfd, cfg, tmp_path, "--doctor")
    assert code == 0, error
    assert list(verdicts(report)) == list(CHECKS) and report["form"] == "full"
    # The weights belong to images twenty times as large.
    assert {k for k, v in verdicts(report).items() if v != "ok"} <= {"losses"}
    assert report["teacher_ap50"] > 50
    levels = report["losses"]["distillation_at_factor_1"]
    assert list(levels) == ["p3", "p4", "p5", "p6", "p7"] and levels["p3"]["fgd_foreground"] > 0
    assert report["losses"]["detection"].keys() == {"loss_cls", "loss_box_reg"}
    out = Path(cfg.OUTPUT_DIR)
    assert sorted(x.name for x in out.iterdir()) == ["doctor.json", "log.txt"], "nothing trained"
    log = (out / "log.txt").read_text()
    for name in (*CHECKS, "Distillation, weighted, at factor 1:"):
        assert f"\n{name}" in log


def test_a_distilled_run_says_twenty_lines_before_its_first_step(teacher, tmp_path, capfd):
    cfg = distilled_cfg(tmp_path, teacher[1])
    assert cli.main(["--config-file", str(write_config(cfg, tmp_path / "c.yaml"))]) == 0
    out = capfd.readouterr().out
    before = out[: out.index("Starting training from iteration 0")].splitlines()
    assert len(before) <= 20
    for text in (
        "Distillation is ON: FGD on p3, p4, p5, p6, p7",
        f"student RetinaNet, teacher RetinaNet from {teacher[1]}",
        "Doctor (brief), written to ",
        "checks are fine",
    ):
        assert sum(text in line for line in before) == 1, text
    log = Path(cfg.OUTPUT_DIR, "log.txt").read_text()
    for text in ("Running with full config", "Environment info", "Model:\nDistiller", "what to do"):
        assert text in log and text not in out
    assert "\x1b[" not in out + log


def test_suspicions_about_boxes_and_shared_images_are_findings(teacher, tmp_path, capfd):
    cfg = distilled_cfg(tmp_path, teacher[1])
    path = Path(cfg.DATASETS.JSON.TRAIN)
    coco = json.loads(path.read_text())
    for entry in coco["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]
    coco["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(coco))
    config = write_config(cfg, tmp_path / "config.yaml")
    test = ["DATASETS.JSON.TEST", str(path)]
    cli.main(["--config-file", str(config), "--doctor", *test])
    capfd.readouterr()
    findings = json.loads((Path(cfg.OUTPUT_DIR) / "doctor.json").read_text())["findings"]
    data = next(finding for finding in findings if finding["name"] == "data")
    assert data["verdict"] == "warning"
    assert data["found"].startswith("8 training images, 16 boxes, 1 of them crowd regions; ")
    assert "boxes reach beyond their image as x, y, width, height, and 16 lie" in data["found"]
    assert "; all 8 test images are in the training set too (the first: " in data["found"]
    log = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert "8 images, 16 boxes, 1 of them crowd regions from " in log


def random_teacher(cfg, teacher, monkeypatch):
    data, path = teacher
    torch.manual_seed(3)
    model = build_model(load_config_text(data["config"], "teacher"))
    torch.save({**data, "model": model.state_dict()}, path)


def swapped_channels(cfg, teacher, monkeypatch):
    data, path = teacher
    config = load_config_text(data["config"], "teacher")
    config.INPUT.FORMAT = "RGB"
    config.MODEL.PIXEL_MEAN = config.MODEL.PIXEL_MEAN[::-1]
    save_teacher(path, config, data["model"])


def missing_backbone_keys(cfg, teacher, monkeypatch):
    data, path = teacher
    gone = [name for name in data["model"] if name.startswith("backbone.bottom_up.")][:2]
    data["model"] = {k: v for k, v in data["model"].items() if k not in gone}
    torch.save(data, path)


def wrong_level_map(cfg, teacher, monkeypatch):
    cfg.MODEL.DISTILLER.LEVEL_MAP = ["p3:p4"]


def one_class_more(cfg, teacher, monkeypatch):
    cfg.MODEL.RETINANET.NUM_CLASSES = 2  # one output fewer than classes


def one_class_fewer(cfg, teacher, monkeypatch):
    cfg.MODEL.RETINANET.NUM_CLASSES = 4


def teacher_in_the_optimizer(cfg, teacher, monkeypatch):
    original = solver.build_optimizer

    def build(cfg, model):
        optimizer = original(cfg, model)
        optimizer.add_param_group({"params": list(model.teacher.backbone.parameters())})
        return optimizer

    monkeypatch.setattr(solver, "build_optimizer", build)


def detached_student_feature(cfg, teacher, monkeypatch):
    original = taps.FeatureTap.pop

    def pop(self):
        features, size = original(self)
        return {name: feature.detach() for name, feature in features.items()}, size

    monkeypatch.setattr(taps.FeatureTap, "pop", pop)


def all_weights_zero(cfg, teacher, monkeypatch):
    for key in cfg.MODEL.DISTILLER.FGD:
        if key.endswith("_WEIGHT"):
            cfg.MODEL.DISTILLER.FGD[key] = 0.0


FAULTS = {
    random_teacher: ("quality", "AP50 0.0 of the teacher on 8 training images"),
    swapped_channels: ("channels", "trained with BGR: set INPUT.FORMAT BGR"),
    missing_backbone_keys: ("weights", "2 not in the file (backbone.bottom_up."),
    wrong_level_map: ("levels", "the student's 'p3' has stride 8, the teacher's 'p4' 16"),
    one_class_more: ("classes", "3 classes (square, disc, cross), the student's"),
    one_class_fewer: ("classes", "MODEL.RETINANET.NUM_CLASSES is 4"),
    teacher_in_the_optimizer: ("optimizer", "parameters of the teacher are in it"),
    detached_student_feature: ("gradients", "loss_fgd_foreground is "),
    all_weights_zero: ("losses", "every distillation term is 0"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_named_and_the_exit_code_is_2(
    plant, teacher, tmp_path, capfd, monkeypatch
):
    cfg = distilled_cfg(tmp_path, teacher[1])
    plant(cfg, teacher, monkeypatch)
    code, error, report = run(capfd, cfg, tmp_path, "--doctor")
    name, text = FAULTS[plant]
    assert code == 2 and "Traceback" not in error
    faults = [k for k, v in verdicts(report).items() if v == "FAULT"]
    # Seen in the wrong colours, the teacher is a bad one too.
    assert faults in ([name], ["channels", "quality"]) and faults[0] == name
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: doctor: {name}: ") and text in line


@pytest.mark.parametrize("plant", [random_teacher, swapped_channels])
def test_the_brief_form_stops_a_run_before_step_one(plant, teacher, tmp_path, capfd, monkeypatch):
    cfg = distilled_cfg(tmp_path, teacher[1])
    plant(cfg, teacher, monkeypatch)
    code, error, report = run(capfd, cfg, tmp_path)
    assert code == 2 and f"error: doctor: {FAULTS[plant][0]}: " in error
    assert report["form"] == "brief"
    assert not list(Path(cfg.OUTPUT_DIR).glob("*.pth"))
    assert not Path(cfg.OUTPUT_DIR, "metrics.json").read_text()
    faults = [k for k, v in verdicts(report).items() if v == "FAULT"]
    accepted = ("DOCTOR.ACCEPT", str(faults), "SOLVER.MAX_ITER", "1")
    code, error, report = run(capfd, cfg, tmp_path, *accepted, "SOLVER.STEPS", "()")
    assert code == 0, error
    assert verdicts(report)[FAULTS[plant][0]] == "warning"


def test_the_brief_form_can_be_told_off_and_is_not_repeated(teacher, tmp_path, capfd, monkeypatch):
    random_teacher(None, teacher, monkeypatch)
    cfg = distilled_cfg(tmp_path, teacher[1], ("DOCTOR.BRIEF", False))
    code, error, report = run(capfd, cfg, tmp_path)
    assert code == 0 and report is None, error
    code, error, report = run(capfd, cfg, tmp_path, "--resume", "SOLVER.MAX_ITER", "2")
    assert code == 0 and report is None, error


def test_another_class_list_of_the_teacher_is_a_fault_until_accepted(teacher, tmp_path, capfd):
    data, path = teacher
    config = load_config_text(data["config"], "teacher")
    save_teacher(path, config, data["model"], [CLASSES[i] for i in (1, 0, 2)])
    cfg = distilled_cfg(tmp_path, path)
    code, error, report = run(capfd, cfg, tmp_path, "--doctor")
    assert code == 2 and "teacher_classes: the same classes in another order" in error
    code, error, report = run(
        capfd, cfg, tmp_path, "--doctor", "DOCTOR.ACCEPT", "['teacher_classes']"
    )
    assert code == 0 and verdicts(report)["teacher_classes"] == "warning", error
    quality = next(x for x in report["findings"] if x["name"] == "quality")
    assert quality["found"].startswith("AP50 whatever the class")


def test_balance_is_applied_once_and_recorded(teacher, tmp_path, capfd):
    cfg = distilled_cfg(tmp_path, teacher[1], ("SOLVER.CHECKPOINT_PERIOD", 1))
    code, error, report = run(capfd, cfg, tmp_path, "--balance")
    assert code == 0, error
    out = Path(cfg.OUTPUT_DIR)
    factor = load_config(str(out / "config.yaml")).MODEL.DISTILLER.FACTOR
    assert factor != 1 and report["losses"]["factor"] == factor
    final = torch.load(out / "model_final.pth", weights_only=True)
    recorded = load_config_text(final["full_config"], "checkpoint").MODEL.DISTILLER.FACTOR
    assert recorded == factor
    assert f"MODEL.DISTILLER.FACTOR {factor:g} instead of 1" in (out / "log.txt").read_text()

    (out / "model_final.pth").unlink()  # killed after the first step
    (out / "model_0000001.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000000.pth")
    code, error, _ = run(capfd, cfg, tmp_path, "--balance", "--resume")
    assert code == 0, error
    resumed = torch.load(out / "model_final.pth", weights_only=True)
    assert resumed["full_config"] == final["full_config"]
    assert all(torch.equal(v, final["model"][k]) for k, v in resumed["model"].items())

    # The same as that factor by hand.
    code, error, _ = run(
        capfd,
        cfg,
        tmp_path,
        "OUTPUT_DIR",
        str(tmp_path / "by_hand"),
        "MODEL.DISTILLER.FACTOR",
        str(factor),
    )
    assert code == 0, error
    by_hand = torch.load(tmp_path / "by_hand" / "model_final.pth", weights_only=True)
    assert all(torch.equal(v, final["model"][k]) for k, v in by_hand["model"].items())


def test_two_processes_end_together(teacher, tmp_path):
    """The teacher's score is the main process's work, the losses' measurement that of both."""
    cfg = distilled_cfg(tmp_path, teacher[1], ("MODEL.DISTILLER.FACTOR", 0.0))
    script = os.path.join(os.path.dirname(sys.executable), "train_net.py")
    config_file = write_config(cfg, tmp_path / "config.yaml")
    command = [sys.executable, script, "--config-file", str(config_file), "--num-gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: doctor: losses: ") and "every distillation term is 0" in line
    report = json.loads(Path(cfg.OUTPUT_DIR, "doctor.json").read_text())
    assert [k for k, v in verdicts(report).items() if v == "FAULT"] == ["losses"]
    assert report["teacher_ap50"] > 50


MISTAKES = {
    "--doctor --resume": "--doctor looks at the start of a run: without --resume",
    "--doctor --eval-only": "without --eval-only",
    "--doctor --balance": "without --balance",
    "--balance --eval-only": "--balance belongs to a training",
    "--balance MODEL.DISTILLER.METHOD ''": "no distillation losses to balance",
    "DOCTOR.ACCEPT ['weights']": "'weights' is none of those that can be",
    "DOCTOR.MIN_AP50 -1.": "DOCTOR.MIN_AP50: -1.0 is not a percentage",
    "DOCTOR.IMAGES 0": "DOCTOR.IMAGES: 0 is not a number above 0",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_options_and_keys_that_mean_nothing(words, teacher_file, tmp_path, capfd):
    cfg = distilled_cfg(tmp_path, teacher_file, ("MODEL.DISTILLER.INHERIT", True))
    code, error, report = run(capfd, cfg, tmp_path, *words.replace("''", "").split(" "))
    assert code == 2 and MISTAKES[words] in error and report is None
