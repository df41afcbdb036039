"""FGD for Detectron2. Importing it registers methods, the Distiller, backbones and config keys.

Folders from the ground up; each imports only those before it (tests/test_imports.py):
processes, data, detectors, methods, distillation, engine, visualize, doctor, adversarial, study,
start, bench.
"""

from .compat import lend_deform_conv
from .config import Keys, add_fgd_config, get_fgd_cfg, hand_in, load_config, student_config
from .data.augmentation import add_augmentation_config, check_augmentation
from .data.datasets import add_data_config
from .data.second_images import add_second_images_config
from .data.unlabeled import add_unlabeled_config, check_unlabeled
from .detectors.backbones import add_timm_config, check_timm
from .detectors.fcos import add_fcos_config
from .detectors.reppoints import add_reppoints_config
from .detectors.vit import add_vit_config, check_vit
from .distillation.config import add_distiller_config, check_distiller
from .distillation.distiller import Distiller
from .doctor.settings import add_doctor_config, check_doctor
from .engine.adaptive import add_adaptive_config, check_adaptive
from .engine.solver import add_solver_config, check_solver
from .errors import DivergedError, UserError
from .methods import METHOD_REGISTRY
from .methods.fgd import FGD
from .methods.fgd.terms import FGDLevelLoss, Weights

hand_in(
    Keys(add_timm_config, check_timm),
    Keys(add_vit_config, check_vit),
    Keys(add_fcos_config),
    Keys(add_reppoints_config),
    Keys(add_data_config),
    Keys(add_augmentation_config, check_augmentation),
    Keys(add_second_images_config),
    Keys(add_unlabeled_config, check_unlabeled),
    Keys(add_solver_config, check_solver),
    Keys(add_doctor_config, check_doctor),
    Keys(add_distiller_config, check_distiller),
    Keys(add_adaptive_config, check_adaptive),  # within the Distiller's
)
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
