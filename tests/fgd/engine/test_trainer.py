import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from fgd.config import student_config
from fgd.engine.history import CLOCKS
from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from tests import tiny_vit  # noqa: F401  timm knows two_blocks_vit then
from tests.fgd.training import assert_equal, distilled, training_cfg


def train(cfg, resume=False):
    torch.manual_seed(cfg.SEED)
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def load(path):
    return torch.load(path, weights_only=True)


def read_metrics(folder):
    """The last value of everything in metrics.json."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


RUNS = {
    "rcnn-vit-adamw-2workers": (
        "GeneralizedRCNN",
        False,
        ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 1e-3, "DATALOADER.NUM_WORKERS", 2)
        + ("MODEL.BACKBONE.NAME", "build_vit_fpn_backbone", "MODEL.TIMM.NAME", "two_blocks_vit")
        + ("MODEL.VIT.SQUARE", 128, "MODEL.FPN.NORM", "LN", "SOLVER.LAYER_DECAY", 0.7),
    ),
    "distilled-clipped-unseeded": (
        "RetinaNet",
        True,
        ("SEED", -1, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0)
        + ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
    ),
}


def begin_second(cfg, folder):
    """A copy of the run in OUTPUT_DIR as it was after four steps; points the config to it."""
    folder.mkdir()
    shutil.copy(Path(cfg.OUTPUT_DIR) / "model_0000003.pth", folder)
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    cfg.OUTPUT_DIR = str(folder)


def assert_same_end(first, second):
    """Weights, optimizer, schedule, random numbers: all that two finished runs have saved."""
    a, b = (load(folder / "model_final.pth") for folder in (first, second))
    for key in ("config", "full_config"):  # OUTPUT_DIR differs
        del a[key], b[key]
    assert_equal(a, b)
    assert read_metrics(first)["lr"] == read_metrics(second)["lr"] > 0
    start = load(first / "model_0000003.pth")["model"]
    moved = {k for k, v in start.items() if not torch.equal(v, a["model"][k])}
    assert len(moved) > 10, "vacuous: the last steps changed nothing"


@pytest.mark.parametrize("run", RUNS)
def test_resumed_training_is_bit_equal_to_uninterrupted(run, tmp_path):
    """8 steps against 4 + 4 with everything rebuilt."""
    arch, distil, opts = RUNS[run]
    # An evaluation right after the checkpoint draws random numbers that the resumed run does not.
    cfg = training_cfg(tmp_path, arch, opts=(*opts, "TEST.EVAL_PERIOD", 4))
    if distil:
        cfg = distilled(cfg, tmp_path)
    train(cfg)
    first = Path(cfg.OUTPUT_DIR)
    begin_second(cfg, tmp_path / "second")
    assert train(cfg, resume=True).start_iter == 4
    assert_same_end(first, tmp_path / "second")
    assert (len(load(first / "model_final.pth")["distiller"]) > 0) is distil


def run_command(cfg, folder, *options):
    """train_net.py in a process of its own."""
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # DATASETS.JSON names them
    (folder / "config.yaml").write_text(cfg.dump())
    code = "from fgd.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "--config-file", str(folder / "config.yaml"), *options]
    subprocess.run(command, check=True, capture_output=True, text=True)


def test_resuming_in_a_new_process_is_bit_equal(tmp_path):
    """TorchScript would change the rounding of functions that a process has called before."""
    cfg = training_cfg(tmp_path)
    run_command(cfg, tmp_path)
    first = Path(cfg.OUTPUT_DIR)
    begin_second(cfg, tmp_path / "second")
    run_command(cfg, tmp_path, "--resume")
    assert_same_end(first, tmp_path / "second")


def test_checkpoint_of_a_distilled_run_is_a_plain_student(tmp_path):
    cfg = distilled(training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 1)), tmp_path)
    trainer = train(cfg)
    path = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    student = build_model(student_config(cfg))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("fvcore.common.checkpoint").addHandler(handler)
    rest = DetectionCheckpointer(student).load(str(path))  # Detectron2's own, unchanged
    logging.getLogger("fvcore.common.checkpoint").removeHandler(handler)
    assert not [m for m in messages if "not found" in m or "not used" in m or "Skip" in m]
    assert_equal(dict(student.state_dict()), dict(trainer.model.student.state_dict()))
    assert rest["classes"] == ["square", "disc", "cross"] and rest["format"] == "fgd-1"
    assert "DISTILLER" not in rest["config"] and "DISTILLER" in rest["full_config"]
    teacher = tmp_path / "teacher.pth"
    sha256 = hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert rest["teacher"] == {"weights": str(teacher), "sha256": sha256}
    logged = read_metrics(Path(cfg.OUTPUT_DIR)).keys()
    assert {"loss_cls", "loss_fgd_attention", "distill/p3", "lr", "data_time", "bbox/AP"} <= logged


def test_scale_of_mixed_precision_is_resumed(tmp_path):
    cfg = training_cfg(tmp_path)
    trainer, other = FGDTrainer(cfg), FGDTrainer(cfg)
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    other._trainer.grad_scaler = torch.amp.GradScaler("cpu")
    other.load_state_dict(trainer.state_dict())
    assert other._trainer.grad_scaler.get_scale() == 8.0


def test_resume_of_a_finished_run_has_nothing_to_do(tmp_path):
    cfg = training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 2))
    assert not train(cfg).is_complete
    assert load(Path(cfg.OUTPUT_DIR) / "model_final.pth")["teacher"] is None
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.is_complete and trainer.start_iter == 2


def test_a_folder_of_another_run_is_refused_or_emptied(tmp_path, caplog):
    cfg = training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 1))
    first = train(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    before = (folder / "model_final.pth").read_bytes()
    (folder / ".tmp_fgd_1_model_final.pth").write_bytes(b"half")
    (folder / "mine.pth").write_bytes(b"weights that the user keeps there")
    with pytest.raises(UserError, match="holds another run .last_checkpoint, model_final.pth"):
        FGDTrainer(cfg).resume_or_load(resume=False)
    assert (folder / "model_final.pth").read_bytes() == before
    assert not list(folder.glob(".tmp*"))
    cfg.SEED = 2
    second = FGDTrainer(cfg)
    second.resume_or_load(resume=False, overwrite=True)
    assert not [x for x in folder.iterdir() if x.name.startswith(("model_", "last", "metrics"))]
    assert "--overwrite: deleted metrics.json, last_checkpoint, model_final.pth of" in caplog.text
    second.train()
    assert (folder / "mine.pth").exists() and first.iter == second.iter
    assert load(folder / "model_final.pth")["trainer"]["data_seed"] == 2


def test_an_allowed_change_of_the_solver_takes_effect(tmp_path):
    """The checkpoint's optimizer and schedule would bring the old learning rate back."""
    cfg = training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ()))
    train(cfg)
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.004, "SOLVER.MOMENTUM", 0.5, "SOLVER.MAX_ITER", 6])
    trainer = FGDTrainer(cfg)
    with pytest.raises(UserError, match="BASE_LR: 0.01 -> 0.004; SOLVER.MOMENTUM: 0.9 -> 0.5"):
        trainer.resume_or_load(resume=True)
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=True, allow_changes=True)
    momenta = [x["momentum_buffer"] for x in trainer.optimizer.state_dict()["state"].values()]
    assert sum(x.abs().sum() > 0 for x in momenta) > 10
    assert {(g["lr"], g["momentum"]) for g in trainer.optimizer.param_groups} == {(0.004, 0.5)}
    trainer.train()
    assert read_metrics(Path(cfg.OUTPUT_DIR))["lr"] == 0.004
    unchanged = FGDTrainer(cfg)
    unchanged.resume_or_load(resume=True)  # the config as the run now is
    assert unchanged.is_complete


def test_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path):
    """Stopped right after a checkpoint, before that iteration was evaluated and written."""
    opts = ("SOLVER.MAX_ITER", 24, "SOLVER.CHECKPOINT_PERIOD", 20, "TEST.EVAL_PERIOD", 20)
    cfg = training_cfg(tmp_path, opts=opts)
    train(cfg)
    whole = metrics_lines(Path(cfg.OUTPUT_DIR))
    assert [line["iteration"] for line in whole] == [19, 23, 24]
    assert "bbox/AP" in whole[0] and "loss_cls" in whole[1]
    cfg.OUTPUT_DIR = str(tmp_path / "second")
    shutil.copytree(tmp_path / "out", tmp_path / "second")
    (tmp_path / "second" / "last_checkpoint").write_text("model_0000019.pth")
    text = (tmp_path / "out" / "metrics.json").read_text()
    for rest in (text[:-30], text, ""):
        (tmp_path / "second" / "metrics.json").write_text(rest)
        (tmp_path / "second" / "last_checkpoint").write_text("model_0000019.pth")
        assert train(cfg, resume=True).start_iter == 20
        assert metrics_lines(tmp_path / "second") == whole


def metrics_lines(folder):
    """metrics.json without what a clock says."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def test_student_weights_may_be_partial_but_not_foreign(tmp_path):
    cfg = training_cfg(tmp_path)
    student = build_model(cfg).state_dict()
    body = {k: v for k, v in student.items() if k.startswith("backbone.bottom_up")}
    torch.save(body, tmp_path / "body.pth")
    torch.save({"other": torch.ones(1)}, tmp_path / "foreign.pth")
    trainer = FGDTrainer(cfg)
    trainer.cfg.MODEL.WEIGHTS = str(tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="student weights .*foreign.pth do not fit: 0 tensors"):
        trainer.resume_or_load(resume=False)
    trainer.cfg.MODEL.WEIGHTS = str(tmp_path / "body.pth")
    trainer.resume_or_load(resume=False)
    loaded = trainer.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in body.items())


def test_inherited_weights_survive_loading_but_not_resuming(tmp_path):
    cfg = distilled(training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 3)), tmp_path)
    cfg.MODEL.DISTILLER.INHERIT = True
    teacher = load(cfg.MODEL.DISTILLER.TEACHER.WEIGHTS)["model"]
    name = "head.cls_score.bias"  # of the same shape in both
    torch.save({name: torch.full_like(teacher[name], 9.0)}, tmp_path / "m.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "m.pth")
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert torch.equal(trainer.model.student.state_dict()[name], teacher[name])
    trainer.train()
    resumed = FGDTrainer(cfg)
    resumed.resume_or_load(resume=True)
    expected = trainer.model.student.state_dict()
    assert_equal(dict(resumed.model.student.state_dict()), dict(expected))
    assert not torch.equal(expected[name], teacher[name])


def test_mixed_precision_on_the_cpu_is_refused_before_building(tmp_path):
    with pytest.raises(UserError, match="mixed precision needs CUDA"):
        FGDTrainer(training_cfg(tmp_path, opts=("SOLVER.AMP.ENABLED", True)))


def test_zero_weights_train_bit_equal_to_the_plain_student(tmp_path):
    plain_cfg = training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 3))
    cfg = distilled(plain_cfg, tmp_path)
    for term in ("FOREGROUND", "BACKGROUND", "ATTENTION", "RELATION"):
        cfg.MODEL.DISTILLER.FGD[f"{term}_WEIGHT"] = 0.0
    cfg.OUTPUT_DIR = str(tmp_path / "distilled")
    plain, student = train(plain_cfg).model, train(cfg).model.student
    assert_equal(dict(plain.state_dict()), dict(student.state_dict()))
