import copy

import pytest
import torch

from fgd.doctor.command import before_step_one
from fgd.doctor.untouched import untouched
from fgd.engine.checkpoint import loss_normalizers
from fgd.engine.trainer import FGDTrainer
from fgd.processes import rng
from tests.fgd.training import assert_equal, distilled, training_cfg

from .clinic import distilled_cfg


def state(trainer):
    """All that a step could depend on."""
    model = trainer.model
    return {
        "model": dict(copy.deepcopy(model.state_dict())),
        "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
        "normalizers": loss_normalizers(model.student),
        "modes": [x.training for x in model.modules()],
        "gradients": [p.grad for p in model.parameters()],
        "rng": rng.get_state(),
        "kept": [model.factor, list(model.schedule), dict(model.table)],
        "stream": [trainer.stream.start, trainer.stream.seed],
    }


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_the_brief_form_leaves_a_trainer_as_it_was(arch, tmp_path):
    cfg = distilled(training_cfg(tmp_path, arch), tmp_path)
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    before = state(trainer)
    before_step_one(trainer)
    assert (tmp_path / "out" / "doctor.json").exists()
    assert_equal(state(trainer), before)


def test_a_run_with_the_brief_form_equals_one_without(teacher_file, tmp_path):
    finals = []
    for brief in (True, False):
        cfg = distilled_cfg(tmp_path, teacher_file, ("DOCTOR.BRIEF", brief, "SOLVER.MAX_ITER", 2))
        cfg.OUTPUT_DIR = str(tmp_path / str(brief))
        cfg.DATASETS.TEST = ()
        torch.manual_seed(cfg.SEED)
        trainer = FGDTrainer(cfg)
        trainer.resume_or_load(resume=False)
        before_step_one(trainer)
        trainer.train()
        final = torch.load(tmp_path / str(brief) / "model_final.pth", weights_only=True)
        for key in ("config", "full_config", "checksum"):  # of OUTPUT_DIR, DOCTOR.BRIEF
            final.pop(key, None)
        finals.append(final)
        assert (tmp_path / str(brief) / "doctor.json").exists() is brief
    assert_equal(*finals)


def test_it_is_the_context_that_undoes_a_forward(tmp_path):
    model = FGDTrainer(distilled(training_cfg(tmp_path), tmp_path)).model.eval()
    name = next(name for name, _ in model.named_buffers() if name.endswith("running_mean"))
    before = copy.deepcopy(dict(model.named_buffers()))
    drawn = rng.get_state()["torch"]
    with untouched(model):
        model.train()
        dict(model.named_buffers())[name] += 1
        model.student.pixel_mean = torch.zeros(5)  # another tensor in the buffer's place
        model.student.loss_normalizer = 5.0  # not there before the first step
        model.factor = 7.0
        torch.rand(3)
    assert not model.training and model.factor == 0
    assert not hasattr(model.student, "loss_normalizer")
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    assert torch.equal(rng.get_state()["torch"], drawn)
