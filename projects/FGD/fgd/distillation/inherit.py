"""Inheriting strategy: start the student's neck and head from the teacher's (FGD paper)."""

import re
from typing import Dict, List, Tuple

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from tabulate import tabulate
from torch import Tensor, nn

from ..errors import UserError

# The FPN lives under backbone. too, and is inherited; so is ViTDet's pyramid, over backbone.net.
_BOTTOM_UP = ("backbone.bottom_up.", "backbone.net.")
_STAGE = re.compile(r"(roi_heads\.box_(?:head|predictor)\.)(\d+)\.(.*)")


def neck_and_head(teacher: nn.Module) -> Dict[str, Tensor]:
    """Copies of every teacher tensor outside the bottom-up network, by name, on the CPU."""
    state = teacher.state_dict()
    return {k: v.detach().cpu().clone() for k, v in state.items() if not k.startswith(_BOTTOM_UP)}


def heritage(teacher: nn.Module, student: nn.Module) -> Dict[str, Tensor]:
    """What this student can take of the teacher's neck and head, under the student's names.

    Of a Cascade R-CNN a plain R-CNN takes the first stage (MTPD). The architectures decide; the
    authors' code looks for "cascade" in the checkpoint's file name.
    """
    tensors = neck_and_head(teacher)
    heads = getattr(student, "roi_heads", None)
    if not is_cascade(teacher) or is_cascade(student) or not isinstance(heads, StandardROIHeads):
        return tensors
    own = heads.box_predictor.bbox_pred.out_features
    theirs = teacher.roi_heads.box_predictor[0].bbox_pred.out_features
    return first_stage(tensors, own // theirs)


def is_cascade(detector: nn.Module) -> bool:
    return isinstance(getattr(detector, "roi_heads", None), CascadeROIHeads)


def first_stage(tensors: Dict[str, Tensor], classes: int) -> Dict[str, Tensor]:
    """A cascade's box head as that of a plain R-CNN (MTPD, the authors' code).

    The first stage's tensors lose their number, later stages are left out. A cascade regresses one
    box for all classes, a plain R-CNN usually one for each: the rows of ``bbox_pred`` (4, F) are
    then repeated to (4 K, F), so that every class starts from the same box. What is not numbered
    stays: neck, RPN, and the mask head, of which Detectron2's cascade has only one. The authors'
    cascade has one for each stage, and they take the first.

    Args:
        classes: K, the student's number of classes; 1 for a student with one box for all too.
    """
    found: Dict[str, Tensor] = {}
    for name, value in tensors.items():
        numbered = _STAGE.fullmatch(name)
        if numbered is None:
            found[name] = value
        elif numbered[2] == "0":
            repeats = classes if numbered[3].startswith("bbox_pred.") else 1
            rows = value.repeat(repeats, *[1] * (value.dim() - 1)) if value.dim() else value
            found[numbered[1] + numbered[3]] = rows
    return found


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
