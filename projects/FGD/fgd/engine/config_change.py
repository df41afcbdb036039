"""What may differ between a run and its continuation, and what alters the training."""

import logging
import math
from typing import Any, Dict, List, Tuple

from ..config import META_ARCHITECTURE, get_fgd_cfg
from ..errors import UserError
from ..methods.method import METHOD_REGISTRY
from ..yaml_config import leaves, parse_yaml

# What a changed key bears on. None of these alters the weights of a resumed run; a study, which
# shows the results of runs that have ended, may pass over the first two kinds only.
NOTHING = "nothing"  # where, how often and how fast
CONTENT = "content"  # names of files and folders, whose content is compared instead
RESULTS = "results"  # how and on what the weights are evaluated
START = "start"  # read at the start of a run only, which a resumed one is past
# A prefix that ends in "." stands for all keys under it that have no row of their own.
HARMLESS = {
    "OUTPUT_DIR": NOTHING,
    "VERSION": NOTHING,
    "VIS_PERIOD": NOTHING,
    "DOCTOR.": NOTHING,
    "DATALOADER.NUM_WORKERS": NOTHING,
    # A run that had no bad image, or stops at one, is the same under any of these.
    "DATALOADER.BAD_IMAGES": NOTHING,
    "DATALOADER.MAX_BAD_IMAGES": NOTHING,
    "DATALOADER.TIMEOUT": NOTHING,
    "MODEL.DISTILLER.PICTURE_PERIOD": NOTHING,
    "SOLVER.CHECKPOINT_PERIOD": NOTHING,
    "SOLVER.KEEP_CHECKPOINTS": NOTHING,
    "SOLVER.IGNORE_SAVE_ERRORS": NOTHING,
    "SOLVER.KEEP_BEST": NOTHING,
    "TEST.EVAL_PERIOD": NOTHING,
    "TEST.EXPECTED_RESULTS": NOTHING,
    "TEST.PRECISE_BN.": "",  # none of these: it replaces the averages of batch norms
    "TEST.": RESULTS,
    "DATASETS.VALID": CONTENT,
    "DATASETS.JSON.VALID": CONTENT,
    "DATASETS.JSON.VALID_IMAGES": CONTENT,
    "DATASETS.TEST": CONTENT,
    "DATASETS.JSON.TEST": CONTENT,
    "DATASETS.JSON.TEST_IMAGES": CONTENT,
    "DATASETS.SHAPES.TEST_IMAGES": CONTENT,
    "DATASETS.SHAPES.ROOT": CONTENT,
    "MODEL.DISTILLER.TEACHER.WEIGHTS": CONTENT,
    "MODEL.WEIGHTS": START,
}
# The same of training data: harmless where their content is known to be equal.
TRAINING_DATA = ("DATASETS.TRAIN", "DATASETS.JSON.TRAIN", "DATASETS.JSON.TRAIN_IMAGES")

_DISTILLER = "MODEL.DISTILLER."
UNLABELED = "DATASETS.JSON.UNLABELED_IMAGES"

logger = logging.getLogger(__name__)


def check_changes(before: dict, now: dict, *, allow: bool) -> bool:
    """Compare a checkpoint with the run that wants to continue from it.

    Args:
        before, now: ``full_config``, ``classes``, ``teacher``, ``data`` and ``processes`` of each,
            and of ``before`` the finished ``iteration``.
        allow: go on although the training is altered.
    Returns:
        Whether it is altered.
    Raises:
        UserError: it is, not allowed, and there is training left to do.
    """
    altering, harmless = training_changes(before, now)
    for change in harmless:
        logger.info(f"--resume with another config: {change}")
    if _other_images(before, now):
        logger.warning(
            "--resume: the training images are not those that the run began with. Files were "
            "replaced or changed, and it goes on with those that are there now"
        )
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
    new = _parse(now["full_config"])
    annotations = [_data(run).get("annotations") for run in (before, now)]
    same_data = bool(annotations[0]) and annotations[0] == annotations[1]
    unlabeled = [_data(run).get("unlabeled") for run in (before, now)]
    for key, change in differences(before["full_config"], now["full_config"]).items():
        fine = same_data if key in TRAINING_DATA else _is_harmless(key, new)
        fine = fine or (key == UNLABELED and unlabeled[0] == unlabeled[1] is not None)
        (harmless if fine else altering).append(change)
    teachers = [run.get("teacher") or {} for run in (before, now)]
    if all(teachers) and teachers[0]["sha256"] != teachers[1]["sha256"]:
        names = [f"{x['weights']} (SHA-256 {x['sha256'][:8]}...)" for x in teachers]
        altering.append(f"content of the teacher's file: {names[0]} -> {names[1]}")
    if all(unlabeled) and unlabeled[0] != unlabeled[1]:  # which is drawn depends on their number
        altering.append(f"images of {UNLABELED}")
    for name in ("classes", "processes"):
        if before[name] != now[name]:
            altering.append(f"{name}: {before[name]} -> {now[name]}")
    return altering, harmless


def _other_images(before: dict, now: dict) -> bool:
    """Whether the training images are known not to be those of before.

    That is said and not refused: whoever mends a damaged image goes on with the run.
    """
    images = [_data(run).get("images") for run in (before, now)]
    return all(images) and images[0] != images[1]


def _data(run: dict) -> dict:
    """Digests of its training set; {} in checkpoints from before they were recorded."""
    found = run.get("data")
    return found if isinstance(found, dict) else {}


def bears_on(key: str) -> str:
    """The kind of a key in `HARMLESS`; "" for all others."""
    if key.endswith("_TEST"):
        return HARMLESS.get(key, RESULTS)
    parents = [key[: i + 1] for i, letter in enumerate(key) if letter == "."]
    return next((HARMLESS[x] for x in (key, *reversed(parents)) if x in HARMLESS), "")


def _is_harmless(key: str, new: Dict[str, Any]) -> bool:
    if key == "SOLVER.MAX_ITER":
        # Then what an iteration does follows from STEPS alone, so that a run can be prolonged or
        # cut short. A cosine is stretched, as is a distillation that fades out.
        steps = new.get("SOLVER.LR_SCHEDULER_NAME") == "WarmupMultiStepLR"
        return steps and new.get("MODEL.DISTILLER.SCHEDULE.DECAY", "none") == "none"
    return bool(bears_on(key)) or _unused(key, new)


def _unused(key: str, new: Dict[str, Any]) -> bool:
    """Whether it is of a distillation, or of a method, that the config has not."""
    if not key.startswith(_DISTILLER):
        return False
    if new.get("MODEL.META_ARCHITECTURE") != META_ARCHITECTURE:
        return True
    chosen = str(new.get(f"{_DISTILLER}METHOD")).split("+")
    others = {name.upper() for name, _ in METHOD_REGISTRY if name not in chosen}
    return key.removeprefix(_DISTILLER).partition(".")[0] in others


def result_changes(before: str, now: str) -> Dict[str, str]:
    """Of `differences` those that bear on the results of a run that has ended."""
    new = _parse(now)
    return {
        key: change
        for key, change in differences(before, now).items()
        if key not in TRAINING_DATA
        and bears_on(key) not in (NOTHING, CONTENT)
        and not _unused(key, new)
    }


def continuing_changes(before: str, now: str) -> Dict[str, str]:
    """Of `differences` those with which a run cannot go on, whatever its data are."""
    new = _parse(now)
    return {
        key: change
        for key, change in differences(before, now).items()
        if key not in (*TRAINING_DATA, UNLABELED) and not _is_harmless(key, new)
    }


def differences(before: str, now: str) -> Dict[str, str]:
    """Key → "KEY: before -> now" of two configs that differ in it, given as yaml.

    A key that is new to this version counts with its default, as it acted.
    """
    old, new = _parse(before), _parse(now)
    if new.keys() - old.keys():
        old = {**_parse(get_fgd_cfg().dump()), **old}
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys}


def _parse(text: str) -> Dict[str, Any]:
    return dict(leaves(parse_yaml(text, "config")))
