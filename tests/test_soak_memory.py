"""T32 in short: tensors, hooks and modules stay as many; a leak is found."""

import pytest
import torch
from detectron2.engine.train_loop import HookBase

from tests.fgd.training import distilled, training_cfg
from tools.soak_memory import Sample, check_counts, watch

OPTS = ("SOLVER.MAX_ITER", 30, "SOLVER.STEPS", (), "TEST.EVAL_PERIOD", 12)
OPTS += ("SOLVER.BASE_LR", 1e-7)


def test_nothing_grows_while_a_student_is_distilled(tmp_path):
    cfg = distilled(training_cfg(tmp_path, opts=OPTS), tmp_path)
    samples = watch(cfg, every=10)
    assert [x.step for x in samples] == [10, 20, 30]
    assert samples[0].tensors > 300 and samples[0].hooks > 0 and samples[0].modules > 100
    assert len({(x.tensors, x.hooks, x.modules) for x in samples}) == 1, samples
    check_counts(samples)


class Leak(HookBase):
    """Keeps a tensor of each step, and hooks each step's forward anew."""

    def __init__(self):
        self.kept = []

    def after_step(self):
        self.kept.append(torch.zeros(3))
        self.trainer.model.register_forward_hook(lambda *_: None)


def test_a_leak_is_found(tmp_path):
    opts = ("SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (), "TEST.EVAL_PERIOD", 0)
    first, last = watch(training_cfg(tmp_path, opts=opts), every=4, hooks=[Leak()])
    assert last.tensors - first.tensors == last.hooks - first.hooks == 4
    with pytest.raises(AssertionError, match="tensors: .* after step 4, .* after step 8"):
        check_counts([first, last])
    with pytest.raises(AssertionError, match="hooks: .* after step 4, .* after step 8"):
        check_counts([first, last._replace(tensors=first.tensors)])


def test_fewer_are_fine():
    check_counts([Sample(1, 9, 5, 3, 2), Sample(2, 99, 4, 3, 2)])
