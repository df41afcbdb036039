"""Checks of what is trained and what is not: the optimizer, and the frozen teacher."""

from typing import List, Optional, Sequence

import torch
from torch import nn

from .findings import FAULT, OK, Finding


def check_frozen(
    teacher: nn.Module, model: nn.Module, wrapped: nn.Module, original: nn.Module
) -> Finding:
    """The teacher has no gradient, is in eval mode, part of nothing, and as its file says.

    Args:
        teacher: the backbone that teaches. model: what is trained; ``wrapped``: in DDP or the same.
        original: the same backbone, freshly loaded.
    """
    problems: List[str] = []
    trainable = [name for name, p in teacher.named_parameters() if p.requires_grad]
    if trainable:
        problems.append(f"{len(trainable)} parameters require a gradient ({trainable[0]}, ...)")
    training = [name or "itself" for name, x in teacher.named_modules() if x.training]
    if training:
        problems.append(f"{len(training)} modules are in training mode ({training[0]}, ...)")
    owned = {id(x) for x in _tensors(teacher)}
    for where, module in (("the trained model", model), ("DistributedDataParallel", wrapped)):
        shared = sum(id(x) in owned for x in _tensors(module))
        if shared:
            problems.append(f"{shared} of its tensors are part of {where}")
    loaded = original.state_dict()
    changed = [k for k, v in teacher.state_dict().items() if not torch.equal(v, loaded[k])]
    if changed:
        problems.append(f"{len(changed)} tensors are not those of its file ({changed[0]}, ...)")
    count = len(loaded)
    if not problems:
        found = f"{count} tensors as in the file, without gradient, in eval mode, part of nothing"
        return Finding("frozen", OK, found)
    advice = "build the teacher with FrozenTeacher and keep it out of every module"
    return Finding("frozen", FAULT, f"the teacher: {'; '.join(problems)}", advice)


def _tensors(module: nn.Module) -> list:
    return [*module.parameters(), *module.buffers()]


def check_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: Optional[nn.Module],
    distillation: Optional[nn.Module],
) -> Finding:
    """Everything trainable is in the optimizer, distillation modules too; the teacher is not."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    taught = [n for n, p in teacher.named_parameters() if id(p) in held] if teacher else []
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    problems = []
    if taught:
        problems.append(f"{len(taught)} parameters of the teacher are in it ({_first(taught)})")
    if left_out:
        problems.append(f"{len(left_out)} trainable parameters are not ({_first(left_out)})")
    own = sum(1 for p in distillation.parameters() if id(p) in held) if distillation else 0
    found = f"{len(held)} parameters, {own} of them of distillation modules"
    if not problems:
        return Finding("optimizer", OK, f"{found}, none of the teacher")
    advice = "the optimizer holds the parameters of the trained model and nothing else"
    return Finding("optimizer", FAULT, f"{found}; {'; '.join(problems)}", advice)


def _first(names: Sequence[str]) -> str:
    return names[0] + (", ..." if len(names) > 1 else "")
