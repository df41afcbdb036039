"""What may differ between a run and its continuation, and what alters the training."""

import logging
import math
from typing import Any, Dict, List, Tuple

from ..config import get_fgd_cfg
from ..errors import UserError
from ..yaml_config import leaves, parse_yaml

# Where and how often files are written, evaluation, and how fast samples are made: each leaves the
# trained weights as they are. A prefix that ends in "." stands for all keys under it.
HARMLESS = (
    "OUTPUT_DIR",
    "VERSION",
    "VIS_PERIOD",
    "TEST.",
    "DOCTOR.",
    "DATASETS.TEST",
    "DATASETS.JSON.TEST",
    "DATASETS.JSON.TEST_IMAGES",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.SHAPES.ROOT",
    "DATASETS.SHAPES.TEST_IMAGES",
    "DATALOADER.NUM_WORKERS",
    # A run that had no bad image, or stops at one, is the same under any of these.
    "DATALOADER.BAD_IMAGES",
    "DATALOADER.MAX_BAD_IMAGES",
    "DATALOADER.TIMEOUT",
    "MODEL.DISTILLER.PICTURE_PERIOD",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.KEEP_CHECKPOINTS",
    "SOLVER.IGNORE_SAVE_ERRORS",
    # Read at the start of a run only, which a resumed one is past.
    "MODEL.WEIGHTS",
    # The content counts, not the name: see `training_changes`.
    "MODEL.DISTILLER.TEACHER.WEIGHTS",
)

logger = logging.getLogger(__name__)


def check_changes(before: dict, now: dict, *, allow: bool) -> bool:
    """Compare a checkpoint with the run that wants to continue from it.

    Args:
        before, now: ``full_config``, ``classes``, ``teacher`` and ``processes`` of each, and of
            ``before`` the finished ``iteration``.
        allow: go on although the training is altered.
    Returns:
        Whether it is altered.
    Raises:
        UserError: it is, not allowed, and there is training left to do.
    """
    altering, harmless = training_changes(before, now)
    for change in harmless:
        logger.info(f"--resume with another config: {change}")
    if not altering:
        return False
    text = "; ".join(altering)
    if allow:
        logger.warning(
            f"--allow-config-change: the run goes on with ANOTHER training than it began with: "
            f"{text}. Its result is not that of either config"
        )
    elif before["iteration"] + 1 >= _parse(now["full_config"]).get("SOLVER.MAX_ITER", math.inf):
        logger.warning(f"The finished run had another config: {text}")
    else:
        raise UserError(
            f"--resume: this is not the run that the checkpoint is of: {text}. Continue with the "
            "config.yaml beside the checkpoint, start anew in another OUTPUT_DIR, or add "
            "--allow-config-change"
        )
    return True


def training_changes(before: dict, now: dict) -> Tuple[List[str], List[str]]:
    """What alters the training, and what does not; each as "KEY: before -> now"."""
    altering, harmless = [], []
    old, new = _parse(before["full_config"]), _parse(now["full_config"])
    for key, change in _differences(old, new).items():
        (harmless if _is_harmless(key, new) else altering).append(change)
    teachers = [run.get("teacher") or {} for run in (before, now)]
    if all(teachers) and teachers[0]["sha256"] != teachers[1]["sha256"]:
        names = [f"{x['weights']} (SHA-256 {x['sha256'][:8]}...)" for x in teachers]
        altering.append(f"content of the teacher's file: {names[0]} -> {names[1]}")
    for name in ("classes", "processes"):
        if before[name] != now[name]:
            altering.append(f"{name}: {before[name]} -> {now[name]}")
    return altering, harmless


def _is_harmless(key: str, new: Dict[str, Any]) -> bool:
    if key == "SOLVER.MAX_ITER":
        # Then what an iteration does follows from STEPS alone, so that a run can be prolonged or
        # cut short. A cosine is stretched, as is a distillation that fades out.
        steps = new.get("SOLVER.LR_SCHEDULER_NAME") == "WarmupMultiStepLR"
        return steps and new.get("MODEL.DISTILLER.SCHEDULE.DECAY", "none") == "none"
    return key.endswith("_TEST") or any(
        key == name or (name.endswith(".") and key.startswith(name)) for name in HARMLESS
    )


def _parse(text: str) -> Dict[str, Any]:
    return dict(leaves(parse_yaml(text, "config")))


def _differences(old: Dict[str, Any], new: Dict[str, Any]) -> Dict[str, str]:
    """Changed keys. A key that is new to this version counts with its default, as it acted."""
    if new.keys() - old.keys():
        old = {**_parse(get_fgd_cfg().dump()), **old}
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys}
