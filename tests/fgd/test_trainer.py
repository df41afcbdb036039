import copy
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
from detectron2.engine.train_loop import HookBase
from detectron2.modeling import build_model

from fgd.config import student_config
from fgd.errors import DivergedError, UserError
from fgd.trainer import FGDTrainer, StopTogether, check_finite

from .training import distilled, training_cfg


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


def assert_equal(a, b, path=""):
    """Deep, bit by bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


RUNS = {
    "rcnn-adamw-2workers": (
        "GeneralizedRCNN",
        False,
        ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 1e-3, "DATALOADER.NUM_WORKERS", 2),
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
    assert {"loss_cls", "loss_fgd_attention", "fgd/p3", "lr", "data_time", "bbox/AP"} <= logged


class PoisonAt(HookBase):
    """Makes the loss of one iteration NaN."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            model = self.trainer.model
            forward = model.forward
            model.forward = lambda x: {k: v * torch.nan for k, v in forward(x).items()}


def test_nan_loss_stops_without_a_step(tmp_path, caplog):
    cfg = training_cfg(tmp_path)
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([PoisonAt(5)])
    states = []
    trainer.optimizer.register_step_post_hook(
        lambda *_: states.append(copy.deepcopy(trainer.model.state_dict()))
    )
    with pytest.raises(DivergedError) as error:
        trainer.train()
    text = str(error.value)
    assert "iteration 5: a loss became infinite or NaN (loss_cls nan, loss_box_reg nan)" in text
    assert "BASE_LR" in text and "\n" not in text and error.value.exit_code == 3
    assert len(states) == 5
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, states[-1][name]) for name, p in trained.items())
    assert all(p.isfinite().all() for p in trained.values())
    saved = Path(cfg.OUTPUT_DIR)
    assert sorted(x.name for x in saved.glob("*.pth")) == ["model_0000003.pth"]


def test_divergence_found_by_detectron2_itself_counts_too(tmp_path, monkeypatch):
    trainer = FGDTrainer(training_cfg(tmp_path))

    def forward(batch):
        raise FloatingPointError("Predicted boxes contain Inf/NaN.\nTraining has diverged.")

    monkeypatch.setattr(trainer.model, "forward", forward)
    with pytest.raises(DivergedError, match="iteration 0: Predicted boxes contain Inf/NaN. Train"):
        trainer.train()


def test_step_trainer_fits_both_versions_of_detectron2():
    """main's ``_write_metrics`` has one parameter more than v0.6's."""

    class OnMain:
        calls = []

        def _write_metrics(self, loss_dict, data_time, prefix="", iter=None):
            self.calls.append((loss_dict, data_time, prefix, iter))

    class Step(StopTogether, OnMain):
        pass

    losses = {"a": torch.tensor(1.0)}
    Step()._write_metrics(losses, 0.5, iter=3)
    assert OnMain.calls == [(losses, 0.5, "", 3)]
    with pytest.raises(DivergedError):
        Step()._write_metrics({"a": torch.tensor(torch.nan)}, 0.5)
    assert len(OnMain.calls) == 1


def test_scale_of_mixed_precision_is_resumed(tmp_path):
    cfg = training_cfg(tmp_path)
    trainer, other = FGDTrainer(cfg), FGDTrainer(cfg)
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    other._trainer.grad_scaler = torch.amp.GradScaler("cpu")
    other.load_state_dict(trainer.state_dict())
    assert other._trainer.grad_scaler.get_scale() == 8.0


def test_check_finite_looks_at_the_sum():
    check_finite({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    with pytest.raises(DivergedError, match=r"\(a 1, b inf\)"):
        check_finite({"a": torch.tensor(1.0), "b": torch.tensor(torch.inf)})


def test_resume_of_a_finished_run_has_nothing_to_do(tmp_path):
    cfg = training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 2))
    assert not train(cfg).is_complete
    assert load(Path(cfg.OUTPUT_DIR) / "model_final.pth")["teacher"] is None
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.is_complete and trainer.start_iter == 2


def test_fresh_run_in_a_used_folder_cannot_be_mixed_up(tmp_path, caplog):
    cfg = training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 1))
    train(cfg)
    (Path(cfg.OUTPUT_DIR) / ".tmp_fgd_1_model_final.pth").write_bytes(b"half")
    FGDTrainer(cfg).resume_or_load(resume=False)
    names = {x.name for x in Path(cfg.OUTPUT_DIR).iterdir()}
    assert "last_checkpoint" not in names and "model_final.pth" in names
    assert not [x for x in names if x.startswith(".tmp")]
    assert "holds an earlier run" in caplog.text
    with pytest.raises(UserError, match="last_checkpoint is missing.*model_final.pth"):
        FGDTrainer(cfg).resume_or_load(resume=True)


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
    plain, student = train(plain_cfg).model, train(cfg).model.student
    assert_equal(dict(plain.state_dict()), dict(student.state_dict()))
