"""Inheriting strategy: start the student's neck and head from the teacher's (FGD paper)."""

from typing import Dict, List, Tuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from ..errors import UserError

_BOTTOM_UP = "backbone.bottom_up."  # the FPN lives under backbone. too, and is inherited


def neck_and_head(teacher: nn.Module) -> Dict[str, Tensor]:
    """Copies of every teacher tensor outside the bottom-up network, by name, on the CPU."""
    state = teacher.state_dict()
    return {k: v.detach().cpu().clone() for k, v in state.items() if not k.startswith(_BOTTOM_UP)}


def inherit(student: nn.Module, tensors: Dict[str, Tensor]) -> str:
    """Copy ``tensors`` into the student where name and shape agree; returns a table of the outcome.

    Call it after all initialisation of the student, pretrained weights included: what runs later
    would undo it.

    Raises:
        UserError: nothing could be copied; the message holds the table.
    """
    own = student.state_dict()
    rows: List[Tuple[str, str]] = []
    copied = 0
    with torch.no_grad():
        for name, value in tensors.items():
            if name not in own:
                rows.append((name, "skipped: the student has none of that name"))
            elif own[name].shape != value.shape:
                shapes = f"teacher {tuple(value.shape)}, student {tuple(own[name].shape)}"
                rows.append((name, f"skipped: {shapes}"))
            else:
                own[name].copy_(value)
                rows.append((name, f"copied {tuple(value.shape)}"))
                copied += 1
    for name in own:
        if name not in tensors and not name.startswith(_BOTTOM_UP):
            rows.append((name, "kept: the teacher has none of that name"))
    table = tabulate(rows, headers=["tensor", f"{copied} of {len(tensors)} copied"])
    if copied == 0:
        raise UserError(
            "MODEL.DISTILLER.INHERIT: no tensor of the teacher's neck and head fits the student; "
            f"use a teacher of the same detector family or switch it off\n{table}"
        )
    return table
