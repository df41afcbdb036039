"""Does a training's memory grow? A tiny distilled run, looked at every few steps.

    python -m tools.soak_memory --steps 2000 --output output/memory

Part of `make soak`; tests/test_soak_memory.py is the short form.
"""

import argparse
import gc
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import HookBase
from tabulate import tabulate
from torch import nn

from fgd.engine.trainer import FGDTrainer
from tests.fgd.training import distilled, training_cfg

# Detectron2 keeps every value of every logged scalar: 1 to 2 KiB per step. A leaked feature map of
# this tiny run would be above 10 KiB per step.
KIB_PER_STEP = 4.0


class Sample(NamedTuple):
    """What the process holds after a step."""

    step: int
    rss: int  # KiB
    tensors: int
    hooks: int  # of modules and of the optimizer
    modules: int


class MemoryWatch(HookBase):
    """Looks every ``every`` steps, after garbage was collected; `samples` has what it saw."""

    def __init__(self, every: int):
        self.every = every
        self.samples: List[Sample] = []

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.every == 0:
            gc.collect()
            self.samples.append(Sample(done, resident_kib(), *count(self.trainer)))


def resident_kib() -> int:
    """Resident memory of this process, from the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def count(trainer: FGDTrainer) -> tuple[int, int, int]:
    """Tensors that exist, hooks on the model and the optimizer, modules that exist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is deprecated warns when it is looked at
        return _count(gc.get_objects(), trainer.optimizer)


def _count(objects: list, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    modules = [x for x in objects if isinstance(x, nn.Module)]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = sum(len(getattr(m, kind, ())) for m in modules for kind in kinds)
    steps = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks += sum(len(getattr(optimizer, kind)) for kind in steps)
    return sum(isinstance(x, torch.Tensor) for x in objects), hooks, len(modules)


def watch(cfg: CfgNode, every: int, hooks: Sequence[HookBase] = ()) -> List[Sample]:
    """Train to SOLVER.MAX_ITER under a `MemoryWatch`, and other hooks before it."""
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    watched = MemoryWatch(every)
    trainer.register_hooks([*hooks, watched])
    trainer.train()
    return watched.samples


def check_counts(samples: Sequence[Sample]) -> None:
    """AssertionError if tensors, hooks or modules are more in the last sample than in the first."""
    first, last = samples[0], samples[-1]
    for name in ("tensors", "hooks", "modules"):
        before, after = getattr(first, name), getattr(last, name)
        assert after <= before, (
            f"{name}: {before} after step {first.step}, {after} after step {last.step}"
        )


def soak(folder: Path, steps: int = 2000) -> Dict[str, float]:
    """Train ``steps`` steps in ``folder``, with evaluations; the figures of its memory.

    Raises:
        AssertionError: it grows: counts, or resident memory by more than `KIB_PER_STEP` from the
            first quarter on. Before that allocators and caches fill.
    """
    opts = ("SOLVER.MAX_ITER", steps, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", steps)
    # A random teacher far from the student: with a larger rate it diverges some time.
    opts += ("TEST.EVAL_PERIOD", steps // 4, "SOLVER.BASE_LR", 1e-7)
    samples = watch(distilled(training_cfg(folder, opts=opts), folder), max(steps // 40, 1))
    settled = [x for x in samples if x.step >= steps // 4]
    check_counts(settled)
    first, last = settled[0], settled[-1]
    growth = (last.rss - first.rss) / (last.step - first.step)
    assert growth <= KIB_PER_STEP, f"resident memory grows by {growth:.2f} KiB per step"
    return {
        "steps": steps,
        f"MiB after {first.step}": round(first.rss / 1024, 1),
        f"MiB after {last.step}": round(last.rss / 1024, 1),
        "KiB per step": round(growth, 2),
        "tensors": last.tensors,
        "hooks": last.hooks,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """1 if memory grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("output/memory"))
    args = parser.parse_args(argv)
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    try:
        figures = soak(args.output.resolve(), args.steps)
    except AssertionError as error:
        print(f"VIOLATION: {error}", file=sys.stderr)
        return 1
    print(tabulate(figures.items(), ["", "memory"], "github"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
