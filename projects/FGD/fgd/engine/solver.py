"""Optimizers: Detectron2's SGD, AdamW, clipping by one norm, learning rates by layer."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_detectron2_schedule
from detectron2.solver import build_optimizer as build_detectron2_sgd
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from torch import nn

from .. import compat
from ..detectors.vit import VisionTransformer, has_vit
from ..errors import DivergedError, UserError

FULL_MODEL = "full_model"


def add_solver_config(cfg: CfgNode) -> None:
    """Add the solver keys of this project, in place.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` may also be "full_model": one L2 norm over all trained
    parameters, the authors' ``grad_clip`` (their max_norm 35 is CLIP_VALUE 35.0). Detectron2's
    "norm" limits the norm of each parameter by itself.
    """
    # "SGD" as in Detectron2, or "AdamW"; both take BASE_LR, WEIGHT_DECAY and WEIGHT_DECAY_NORM.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Of a student over a vision transformer (MODEL.VIT): what a block's learning rate is times that
    # of the next one, see `scale_layers`. ViTDet's is 0.7 for ViT-B and 0.8 for ViT-L. 1 = off.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Of the checkpoints that CHECKPOINT_PERIOD makes, keep only so many, the newest; 0 = all. The
    # final one always stays.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0
    # A periodic checkpoint that cannot be written, say on a full disk, stops the training. True:
    # only warn, and try again a period later. The final one must be written in any case.
    cfg.SOLVER.IGNORE_SAVE_ERRORS = False
    # Evaluate and save the exponential moving average of the student's weights, see
    # `fgd.engine.average`; customary are 0.999 to 0.9999. 0 = the weights themselves.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Keep the checkpoint of the best evaluation as model_best.pth, by a metric such as "bbox/AP" of
    # DATASETS.VALID or, without that, of DATASETS.TEST. Needs TEST.EVAL_PERIOD. "" = do not.
    cfg.SOLVER.KEEP_BEST = ""


def check_solver(cfg: CfgNode) -> None:
    """Refuse settings that only show when the model has been built.

    Raises:
        UserError: names the key, what was found and what is allowed.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in ("SGD", "AdamW"):
        raise UserError(f"SOLVER.OPTIMIZER: {solver.OPTIMIZER!r} is neither 'SGD' nor 'AdamW'")
    if not 0 < solver.LAYER_DECAY <= 1:
        raise UserError(
            f"SOLVER.LAYER_DECAY: {solver.LAYER_DECAY} is not in (0, 1]; ViTDet's are 0.7 and 0.8, "
            "1 is off"
        )
    if solver.LAYER_DECAY != 1 and not has_vit(cfg):
        raise UserError(
            f"SOLVER.LAYER_DECAY {solver.LAYER_DECAY}: MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} has no vision transformer whose blocks it is for; set it "
            "to 1"
        )
    if solver.KEEP_CHECKPOINTS < 0:
        raise UserError(
            f"SOLVER.KEEP_CHECKPOINTS: {solver.KEEP_CHECKPOINTS} is not a number of files, or 0"
        )
    _check_chosen(cfg)
    allowed = (*compat.clip_types(), FULL_MODEL)
    if solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_TYPE not in allowed:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE: {solver.CLIP_GRADIENTS.CLIP_TYPE!r} is not one of "
            f"{', '.join(allowed)}"
        )
    if solver.AMP.ENABLED and torch.device(cfg.MODEL.DEVICE).type != "cuda":
        raise UserError(
            f"SOLVER.AMP.ENABLED: mixed precision needs CUDA, but MODEL.DEVICE is "
            f"{cfg.MODEL.DEVICE!r}; set SOLVER.AMP.ENABLED False"
        )


def _check_chosen(cfg: CfgNode) -> None:
    """The same of what becomes a checkpoint's model, and of the checkpoint that is kept."""
    decay, metric = cfg.SOLVER.EMA_DECAY, cfg.SOLVER.KEEP_BEST
    if not 0 <= decay < 1:
        raise UserError(
            f"SOLVER.EMA_DECAY: {decay} is not in [0, 1); customary are 0.999 to 0.9999, 0 is off"
        )
    if decay and cfg.TEST.PRECISE_BN.ENABLED:
        raise UserError(
            f"SOLVER.EMA_DECAY {decay}: TEST.PRECISE_BN measures batch norms for the weights that "
            "are trained, not for their average; set TEST.PRECISE_BN.ENABLED False"
        )
    if metric and cfg.TEST.EVAL_PERIOD <= 0:
        raise UserError(
            f"SOLVER.KEEP_BEST {metric}: TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, so nothing is "
            "evaluated before the end; set it to a number of iterations"
        )
    data = cfg.DATASETS
    if metric and not (data.JSON.VALID or data.VALID or data.JSON.TEST or data.TEST):
        raise UserError(
            f"SOLVER.KEEP_BEST {metric}: nothing is evaluated; DATASETS.JSON.VALID names the set "
            "to choose by"
        )


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Optimizer over all parameters of ``model`` that require a gradient.

    SGD is built by Detectron2 itself, so its parameter groups are exactly its own; AdamW uses the
    same groups. Value and per-parameter norm clipping are Detectron2's too. `scale_layers` divides
    the groups of vision transformers.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip_full_model = clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL
    if clip_full_model:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False  # its solver does not know this type
    build = {"SGD": build_detectron2_sgd, "AdamW": _build_adamw}[cfg.SOLVER.OPTIMIZER]
    optimizer = build(cfg, model)
    scale_layers(optimizer, model, cfg.SOLVER.LAYER_DECAY)
    if clip_full_model:
        max_norm = clip.CLIP_VALUE
        # A pre-hook runs in optimizer.step(). There the gradients are those that are applied:
        # GradScaler has divided its scale out, and has skipped steps with overflows.
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: clip_full_norm(opt, max_norm))
    return optimizer


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return adamw(groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


def scale_layers(optimizer: torch.optim.Optimizer, model: nn.Module, decay: float) -> None:
    """Learning rates of vision transformers by ViTDet's rule, in place.

    Of n blocks, block i, counted from 0, has ``decay ** (n - i)`` of the base rate, embeddings
    (patches, positions, class token) have ``decay ** (n + 1)``, all else has 1. Embeddings of
    positions have no weight decay. Source: Detectron2's `get_vit_lr_decay_rate`, and ``overrides``
    in its projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py, which has no class token.
    """
    factors, positions = {}, set()
    for network in (x for x in model.modules() if isinstance(x, VisionTransformer)):
        for layer in network.layers():
            factors[layer.parameter] = decay ** (network.blocks + 1 - layer.depth)
            if layer.is_position:
                positions.add(layer.parameter)
    if not factors:
        return
    divided = []
    for group in optimizer.param_groups:
        for x in group["params"]:
            weight_decay = 0.0 if x in positions else group["weight_decay"]
            own = {"params": [x], "lr": group["lr"] * factors.get(x, 1.0)}
            divided.append({**group, **own, "weight_decay": weight_decay})
    optimizer.param_groups.clear()
    for group in reduce_param_groups(divided):
        optimizer.add_param_group(group)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer):
    """Detectron2's schedule of SOLVER.LR_SCHEDULER_NAME, with its complaints made readable."""
    solver = cfg.SOLVER
    try:
        return build_detectron2_schedule(cfg, optimizer)
    except ValueError as error:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME}, STEPS {tuple(solver.STEPS)}, "
            f"MAX_ITER {solver.MAX_ITER}: {error} (steps must increase and end below MAX_ITER)"
        ) from error


def clip_full_norm(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale all gradients by one factor so that their joint L2 norm is at most ``max_norm``.

    Raises:
        DivergedError: the norm is NaN or infinite. Scaling by it would spread NaN to every weight.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if not torch.isfinite(norm):
        raise DivergedError(f"the gradient's norm is {norm.item()}; no step was taken with it")
