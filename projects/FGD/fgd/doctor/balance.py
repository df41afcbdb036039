"""--balance: sets MODEL.DISTILLER.FACTOR once, at the start of a run, and records it."""

import logging

from detectron2.config import CfgNode

from ..config import META_ARCHITECTURE, load_config_text
from ..engine.run_folder import newest_checkpoint
from ..engine.trainer import FGDTrainer
from ..errors import UserError
from ..processes import rng
from .losses import measure, suggested_factor
from .patient import Patient

logger = logging.getLogger(__name__)


def balanced_factor(cfg: CfgNode, *, resume: bool) -> float:
    """The factor for this run: measured, or that of the run which is resumed.

    All processes call it together and get the same. Nothing of the run has begun: models are
    built for this alone, and the random number generators are afterwards as before.

    Args:
        cfg: with registered datasets.
    Raises:
        UserError: there is no distillation loss, or none that a factor could balance.
    """
    node = cfg.MODEL
    if node.META_ARCHITECTURE != META_ARCHITECTURE or not node.DISTILLER.METHOD:
        raise UserError("--balance: this config has no distillation losses to balance")
    found = newest_checkpoint(cfg.OUTPUT_DIR) if resume else None
    if found is not None:
        path, content = found
        recorded = load_config_text(content["full_config"], f"config in {path}")
        factor = recorded.MODEL.DISTILLER.FACTOR
        logger.info(f"--balance: the resumed run has MODEL.DISTILLER.FACTOR {factor:g}")
        return factor
    with rng.preserved():
        stream = FGDTrainer.build_train_loader(cfg)
        batches = stream.first_batches(cfg.DOCTOR.BATCHES)
        model = Patient.build(cfg, stream).model
        measured = measure(model, batches, half=cfg.SOLVER.AMP.ENABLED)
    factor = suggested_factor(measured)
    if not factor:
        raise UserError(
            "--balance: every distillation term is 0, or one is not finite; look at the weights "
            "of the method, or at what --doctor finds"
        )
    logger.info(
        f"--balance: MODEL.DISTILLER.FACTOR {factor:g} instead of {node.DISTILLER.FACTOR:g}, over "
        f"{cfg.DOCTOR.BATCHES} batches"
    )
    return factor
