"""Focal and Global Knowledge Distillation (FGD, CVPR 2022, arXiv 2111.11837).

Published, COCO box AP of the student without and with it: RetinaNet R-50 37.4 → 40.7, Faster R-CNN
R-50 38.4 → 42.0, RepPoints R-50 38.6 → 42.0, FCOS R-50 38.5 → 42.7.
"""

from functools import partial
from typing import Callable, Dict, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ...errors import UserError
from ..batch import Batch, Level
from ..method import METHOD_REGISTRY, Method, Picture, Table
from ..parts import small_dtype
from .attention import spatial_attention
from .fused import fused_terms
from .masks import cell_weights
from .terms import TERMS, FGDLevelLoss, Weights, composed_terms


def terms_function(implementation: str) -> Callable[..., Dict[str, Tensor]]:
    """What computes a level's four terms; the values and gradients are the same.

    "torch": one fused operation in plain PyTorch. "triton": the same with kernels for an NVIDIA
    GPU. "composed": the readable definition, several times slower and larger in memory.

    Raises:
        UserError: none of these, or Triton is not installed.
    """
    if implementation == "torch":
        return fused_terms
    if implementation == "composed":
        return composed_terms
    if implementation != "triton":
        raise UserError(
            f"MODEL.DISTILLER.FGD.IMPLEMENTATION: {implementation!r} is none of 'torch', 'triton' "
            "and 'composed'"
        )
    try:
        from . import sweep_triton
    except ImportError as error:
        raise UserError(f"MODEL.DISTILLER.FGD.IMPLEMENTATION triton: {error}") from error
    return partial(fused_terms, kernels=sweep_triton)


@METHOD_REGISTRY.register()
class FGD(Method):
    """L = sum over levels of alpha L_fg + beta L_bg + gamma L_att + lambda L_rel; see `terms`.

    Args:
        levels: names and channels. weights: of the four terms. temperature: > 0.
        mask_reference: "padded" or "image", see `masks.cell_weights`.
        terms: how a level's terms are computed, see `terms_function`.
    """

    terms = TERMS
    boxless = ("attention", "relation")

    def __init__(
        self,
        levels: Sequence[Level],
        weights: Weights,
        temperature: float,
        mask_reference: str,
        terms: Callable[..., Dict[str, Tensor]] = fused_terms,
    ):
        super().__init__(levels, weights._asdict())
        self.mask_reference = mask_reference
        self.levels = nn.ModuleDict(
            {
                level.name: FGDLevelLoss(
                    level.student_channels, level.teacher_channels, weights, temperature, terms
                )
                for level in levels
            }
        )

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # The four weights of one level's terms, no unit. Sums over cells and channels divided by
        # the images per GPU, so they belong to the input size: RetinaNet's at 1333x800 are the
        # default.
        node.FOREGROUND_WEIGHT = 1e-3  # alpha
        node.BACKGROUND_WEIGHT = 5e-4  # beta
        node.ATTENTION_WEIGHT = 5e-4  # gamma; authors' class default 1e-3, their configs 5e-4
        node.RELATION_WEIGHT = 5e-6  # lambda
        # Softmax temperature of the attention maps; the authors use 0.8 for FCOS.
        node.TEMPERATURE = 0.5
        # Pixels that a feature map spans: "padded" = the padded batch, geometrically right;
        # "image" = each image's own size, the authors' scaling, which stretches masks under
        # padding.
        node.MASK_REFERENCE = "padded"
        # What computes the terms, with equal results: "torch"; "triton", kernels for NVIDIA GPUs
        # that have not run on one yet, hence not the default; "composed", the slow definition.
        node.IMPLEMENTATION = "torch"

    @classmethod
    def check_config(cls, node: CfgNode, cfg: CfgNode) -> None:
        key = "MODEL.DISTILLER.FGD"
        if node.MASK_REFERENCE not in ("padded", "image"):
            raise UserError(
                f"{key}.MASK_REFERENCE: {node.MASK_REFERENCE!r} is neither 'padded' nor 'image'"
            )
        if not node.TEMPERATURE > 0:
            raise UserError(f"{key}.TEMPERATURE: {node.TEMPERATURE} is not above 0")
        terms_function(node.IMPLEMENTATION)
        if node.IMPLEMENTATION == "triton" and not cfg.MODEL.DEVICE.startswith("cuda"):
            raise UserError(
                f"{key}.IMPLEMENTATION triton needs MODEL.DEVICE cuda, found {cfg.MODEL.DEVICE}"
            )

    @classmethod
    def without_gpu(cls, node: CfgNode) -> None:
        if node.IMPLEMENTATION == "triton":
            node.IMPLEMENTATION = "torch"

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "FGD":
        node = cls.node(cfg)
        weights = Weights(**cls.weights_of(node))
        terms = terms_function(node.IMPLEMENTATION)
        return cls(levels, weights, node.TEMPERATURE, node.MASK_REFERENCE, terms)

    def forward(self, batch: Batch) -> Table:
        """Level → each of `TERMS`, weighted.

        Raises:
            ValueError: the grids of a level differ; names the level.
        """
        found: Table = {}
        for name, level_loss in self.levels.items():
            try:
                found[name] = level_loss(
                    batch.student[name], batch.teacher[name], *self._masks(batch, name)
                )
            except ValueError as error:
                raise ValueError(f"FGD level {name!r}: {error}") from None
        return found

    def _masks(self, batch: Batch, level: str) -> tuple:
        padded = self.mask_reference == "padded"
        sizes = [batch.padded_size] * len(batch.boxes) if padded else batch.image_sizes
        own = batch.student[level]
        dtype = small_dtype(own, batch.teacher[level])
        return cell_weights(batch.boxes, own.shape[-2:], sizes, dtype)

    @torch.no_grad()
    def pictures(self, batch: Batch, image: int) -> Dict[str, Dict[str, Picture]]:
        """The weights of the cells and the spatial attention of both sides.

        The fused loss makes the attention inside its sweep over the maps, so that is computed
        again, by its definition.
        """
        found = {}
        for name, loss in self.levels.items():
            own, teacher, foreground, background = (
                x[image : image + 1]
                for x in (batch.student[name], batch.teacher[name], *self._masks(batch, name))
            )
            dtype = small_dtype(own, teacher)
            own = own.to(dtype) if loss.align is None else loss.align(own.to(dtype))
            teacher, student = (
                spatial_attention(x.to(dtype), loss.temperature) for x in (teacher, own)
            )
            array = lambda x: x[0].cpu().numpy()  # noqa: E731
            found[name] = {
                "foreground": Picture(array(foreground)),
                "background": Picture(array(background)),
                "teacher attention": Picture(array(teacher), "attention"),
                "student attention": Picture(array(student), "attention"),
                # student - teacher: what the attention term pulls to 0
                "difference": Picture(array(student - teacher)),
            }
        return found
