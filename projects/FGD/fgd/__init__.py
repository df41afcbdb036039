"""FGD for Detectron2. Importing it registers the Distiller and the timm FPN backbones."""

from .compat import lend_deform_conv
from .config import add_fgd_config, get_fgd_cfg, load_config, student_config
from .distillation.distiller import Distiller
from .distillation.methods import FGD, METHOD_REGISTRY
from .errors import DivergedError, UserError
from .loss.terms import FGDLevelLoss, Weights

lend_deform_conv()

__all__ = [
    "METHOD_REGISTRY",
    "Distiller",
    "DivergedError",
    "FGDLevelLoss",
    "FGD",
    "UserError",
    "Weights",
    "add_fgd_config",
    "get_fgd_cfg",
    "load_config",
    "student_config",
]
