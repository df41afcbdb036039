"""Teachers that Detectron2 describes by LazyConfig: "lazy:<name>" of a table of ours.

Nothing that a user's config names is executed. Python code of the user's is, if the command line
says so (``--trust-config``), whatever configs and checkpoints say.
"""

import os
from typing import Set, Tuple

from detectron2 import modeling
from detectron2.config import CfgNode, LazyConfig, instantiate
from omegaconf import DictConfig
from torch import nn

from ..config import get_fgd_cfg, student_config
from ..data.checks import NUM_CLASSES_KEYS
from ..errors import UserError, in_one_line
from .lazy_zoo import TEACHERS, Entry

KEY = "MODEL.DISTILLER.TEACHER.CONFIG_FILE"
PREFIX, _CODE = "lazy:", ".py"
_TRUSTED: Set[str] = set()  # real paths; of this process


def is_lazy(file: str) -> bool:
    """Whether a CONFIG_FILE is a name of the table, or Python code."""
    return file.startswith(PREFIX) or file.endswith(_CODE)


def trust(option: str, file: str) -> None:
    """Let the code be executed that ``--trust-config`` names.

    Args:
        option: its value, "" if it was not given. file: the config's CONFIG_FILE.
    Raises:
        UserError: they are not the same file, or it is none.
    """
    if not option:
        return
    if not option.endswith(_CODE) or not os.path.isfile(option):
        raise UserError(f"--trust-config {option}: there is no such file of Python code")
    if not file or os.path.realpath(option) != os.path.realpath(file):
        raise UserError(f"--trust-config {option}: {KEY} is {file!r}; name the same file there")
    _TRUSTED.add(os.path.realpath(option))


def check_lazy_teacher(file: str) -> None:
    """Raise UserError if this Detectron2 cannot build it, or it is code that nobody trusts."""
    if file.startswith(PREFIX):
        _entry(file)
    elif os.path.realpath(file) not in _TRUSTED:
        raise UserError(
            f"{KEY} {file}: Python code, which is executed only by train_net.py and if its "
            f"command line says --trust-config {file} as well"
        )


def lazy_weights(file: str) -> str:
    """The published weights of a name of the table; "" for any other CONFIG_FILE."""
    entry = TEACHERS.get(file.removeprefix(PREFIX)) if file.startswith(PREFIX) else None
    return entry.weights if entry else ""


def lazy_text(file: str) -> str:
    """What makes two of them the same teacher on all machines: the name, or the code."""
    check_lazy_teacher(file)
    if file.startswith(PREFIX):
        return file
    with open(file, encoding="utf-8", errors="replace") as code:
        return code.read()


def build_lazy_teacher(file: str, device: str) -> Tuple[nn.Module, CfgNode]:
    """The teacher with random weights.

    Returns:
        Also a config that says of it what a detector's own says: architecture, classes, channel
        order, mean and deviation, which are the model's.
    Raises:
        UserError: as `check_lazy_teacher`; or trusted code fails, or describes no detector.
    """
    check_lazy_teacher(file)
    if file.startswith(PREFIX):
        model = instantiate(_entry(file).describe())
    else:
        model = _built_by_code(file)
    return model.to(device), _config_of(model, device)


def _entry(file: str) -> Entry:
    name = file.removeprefix(PREFIX)
    if name not in TEACHERS:
        raise UserError(f"{KEY} {file}: there is no such teacher; there are {', '.join(TEACHERS)}")
    entry = TEACHERS[name]
    missing = [x for x in entry.needs if not hasattr(modeling, x)]
    if missing:
        raise UserError(
            f"{KEY} {file}: this Detectron2 has no detectron2.modeling.{missing[0]}; v0.6 lacks "
            "it, Detectron2's main branch has it (docs/install.md says how to install that)"
        )
    return entry


def _built_by_code(file: str) -> nn.Module:
    try:
        described = LazyConfig.load(file).get("model")
        model = instantiate(described) if isinstance(described, DictConfig) else None
    except Exception as error:  # it may raise anything
        raise UserError(f"{KEY} {file}: {in_one_line(error)}") from error
    lacking = [x for x in ("backbone", "pixel_mean", "pixel_std") if not hasattr(model, x)]
    if lacking:
        raise UserError(
            f"{KEY} {file}: its 'model' builds no detector of Detectron2's kind (no {lacking[0]})"
        )
    if getattr(model, "input_format", None) is None:
        raise UserError(f"{KEY} {file}: set model.input_format, the order of channels, RGB or BGR")
    return model


def _config_of(model: nn.Module, device: str) -> CfgNode:
    config = student_config(get_fgd_cfg())
    config.MODEL.META_ARCHITECTURE, config.MODEL.DEVICE = type(model).__name__, device
    config.INPUT.FORMAT = model.input_format
    # Buffers are single precision: 123.675 is 123.67500305 in it.
    config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD = (
        [round(x, 4) for x in values.flatten().tolist()]
        for values in (model.pixel_mean, model.pixel_std)
    )
    key = NUM_CLASSES_KEYS.get(config.MODEL.META_ARCHITECTURE)
    if key is not None:
        heads = model.roi_heads if "ROI_HEADS" in key else model
        config.merge_from_list([key, heads.num_classes])  # all of Detectron2's have it
    return config
