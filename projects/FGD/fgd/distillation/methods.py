"""Distillation methods behind one interface; each is one registered class.

A method is an nn.Module that owns whatever it trains beside the student:

    method = METHOD_REGISTRY.get(name).from_config(cfg, levels)
    losses = method(student_features, teacher_features, boxes, image_sizes, padded_size)

Both feature dicts are keyed by the student's level. ``losses`` maps ``method.loss_names`` to
weighted scalars, ready for Detectron2's loss dict. After each call ``method.level_totals`` maps
each level to its detached total, for logging.
"""

from functools import partial
from typing import Callable, Dict, List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..errors import UserError
from ..loss.fused import fused_terms
from ..loss.masks import cell_weights
from ..loss.sweep import small_dtype
from ..loss.terms import TERMS, FGDLevelLoss, Weights, composed_terms
from .features import Level

METHOD_REGISTRY = Registry("DISTILLATION_METHOD")


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
        from ..loss import sweep_triton
    except ImportError as error:
        raise UserError(f"MODEL.DISTILLER.FGD.IMPLEMENTATION triton: {error}") from error
    return partial(fused_terms, kernels=sweep_triton)


@METHOD_REGISTRY.register()
class FGD(nn.Module):
    """Focal and Global Knowledge Distillation over all distilled levels, which are summed.

    Args:
        levels: names and channels. weights: of the four terms. temperature: > 0.
        mask_reference: "padded" or "image", see `fgd.loss.masks.cell_weights`.
        terms: how a level's terms are computed, see `terms_function`.
    """

    loss_names = tuple(f"loss_fgd_{term}" for term in TERMS)

    def __init__(
        self,
        levels: Sequence[Level],
        weights: Weights,
        temperature: float,
        mask_reference: str,
        terms: Callable[..., Dict[str, Tensor]] = fused_terms,
    ):
        super().__init__()
        self.mask_reference = mask_reference
        self.levels = nn.ModuleDict(
            {
                level.name: FGDLevelLoss(
                    level.student_channels, level.teacher_channels, weights, temperature, terms
                )
                for level in levels
            }
        )
        self.level_totals: Dict[str, Tensor] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode, levels: Sequence[Level]) -> "FGD":
        node = cfg.MODEL.DISTILLER.FGD
        weights = Weights(
            node.FOREGROUND_WEIGHT,
            node.BACKGROUND_WEIGHT,
            node.ATTENTION_WEIGHT,
            node.RELATION_WEIGHT,
        )
        terms = terms_function(node.IMPLEMENTATION)
        return cls(levels, weights, node.TEMPERATURE, node.MASK_REFERENCE, terms)

    def forward(
        self,
        student: Dict[str, Tensor],
        teacher: Dict[str, Tensor],
        boxes: List[Tensor],
        image_sizes: List[Tuple[int, int]],
        padded_size: Tuple[int, int],
    ) -> Dict[str, Tensor]:
        """``loss_fgd_{foreground,background,attention,relation}``: weighted, summed over levels.

        Args:
            student, teacher: level → (N, C, H, W).
            boxes: N ground-truth tensors (R_i, 4), XYXY in pixels of the network input.
            image_sizes: N (height, width) before padding. padded_size: of the batch.
        Raises:
            ValueError: the grids of a level differ; names the level.
        """
        sizes = [padded_size] * len(boxes) if self.mask_reference == "padded" else image_sizes
        losses: Dict[str, Tensor] = {}
        for name, level_loss in self.levels.items():
            dtype = small_dtype(student[name], teacher[name])
            masks = cell_weights(boxes, student[name].shape[-2:], sizes, dtype)
            try:
                terms = level_loss(student[name], teacher[name], *masks)
            except ValueError as error:
                raise ValueError(f"FGD level {name!r}: {error}") from None
            self.level_totals[name] = sum(terms.values()).detach()
            for term, value in terms.items():
                key = f"loss_fgd_{term}"
                losses[key] = losses[key] + value if key in losses else value
        return losses
