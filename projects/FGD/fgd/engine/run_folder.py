"""A run's folder: which checkpoint to continue from, which to delete, whose folder it is."""

import logging
import os
import re
from contextlib import contextmanager, suppress
from typing import Callable, Iterator, List, Optional, Tuple

import torch

from ..checkpoint_entries import FORMAT
from ..errors import UserError
from ..files import atomic_write, check_seal
from ..weights import read_weights

_POINTER = "last_checkpoint"
_PERIODIC = re.compile(r"model_(\d{7})\.pth")
# Names that only a training run gives to files. Others in the folder may be anyone's.
_OWN = re.compile(r"model_(\d{7}|final|best|diverged\w*)\.pth|last_checkpoint")
_STATE = ("trainer", "rng", "iteration", "distiller", "full_config", "classes")
_RECORDS = ("metrics.json", "results.json", "start.json")

logger = logging.getLogger(__name__)


def write_pointer(folder: str, name: str) -> None:
    """Make `last_checkpoint` name a file of the folder, as Detectron2 does."""
    atomic_write(os.path.join(folder, _POINTER), lambda file: file.write(name.encode()))


def newest_checkpoint(folder: str) -> Optional[Tuple[str, dict]]:
    """Path and content of the checkpoint to continue from; None if the folder has none at all.

    That is the one that `last_checkpoint` names. If there is a fault with it, said in the log, it
    is the one of the highest iteration among those that are whole.

    Raises:
        UserError: there are checkpoints, and none can be continued from; names each and its fault.
    """
    named, fault = _read_pointer(folder)
    if not named and not fault:
        return None
    faults = [fault] if fault else []
    for name in _candidates(folder, named):
        path = os.path.join(folder, name)
        try:
            data = read_checkpoint(path)
        except UserError as error:
            logger.warning(f"--resume: not from {error}")
            faults.append(str(error))
            continue
        if faults:
            logger.warning(
                f"--resume: {faults[0]}. Continuing from {path} (iteration {data['iteration']}), "
                "the newest checkpoint that is whole"
            )
        return path, data
    raise UserError(
        f"--resume: nothing in {folder} can be continued from: {'; '.join(faults)}. Put a whole "
        "checkpoint there, or start anew in another OUTPUT_DIR or with --overwrite"
    )


def read_checkpoint(path: str) -> dict:
    """Content of a training checkpoint, proved to be what was written.

    Raises:
        UserError: damaged, or not a training checkpoint of this project.
    """
    data = read_weights(path)
    if data.get("format") != FORMAT or any(data.get(name) is None for name in _STATE):
        raise UserError(
            f"{path}: it holds no training state of this project; to start from its weights pass "
            "MODEL.WEIGHTS instead of --resume"
        )
    if "checksum" not in data:
        logger.info(f"{path} is from before checkpoints had a SHA-256; its CRC-32s are right")
    return data


def _read_pointer(folder: str) -> Tuple[str, str]:
    """The name in `last_checkpoint`, or "" and what is wrong; both "" in a folder of no run."""
    pointer, present = os.path.join(folder, _POINTER), _weight_files(folder)
    if not os.path.isfile(pointer):
        return "", f"{pointer} is missing" if present else ""
    with open(pointer, errors="replace") as file:
        name = file.read().strip()
    if name not in present:  # nor followed out of the folder
        return "", f"{pointer} names {name!r}, which is not in that folder"
    return name, ""


def _weight_files(folder: str) -> List[str]:
    if not os.path.isdir(folder):
        return []
    return sorted(x for x in os.listdir(folder) if x.endswith(".pth") and not x.startswith("."))


def _candidates(folder: str, named: str) -> Iterator[str]:
    """``named``, if any; then, only if asked for more, the others by falling iteration.

    Not by time of change: copying a folder changes that.
    """
    if named:
        yield named
    # What diverged would diverge again.
    others = [x for x in _weight_files(folder) if x != named and "diverged" not in x]
    yield from sorted(others, key=lambda name: -_iteration(os.path.join(folder, name)))


def _iteration(path: str) -> int:
    """What the file says, unproved; -1 if it says nothing, and the caller tries it last."""
    found = _peek(path).get("iteration")
    return found if isinstance(found, int) else -1


def recorded(folder: str, name: str = "") -> dict:
    """What a checkpoint says of its run, unproved; without a name the one of `last_checkpoint`.

    Returns:
        "full_config", "data", "teacher" and "best", those that are there.
    """
    name = name or _read_pointer(folder)[0]
    found = _peek(os.path.join(folder, name)) if name else {}
    kinds = {"full_config": str, "data": dict, "teacher": dict, "best": dict}
    return {key: found[key] for key, kind in kinds.items() if isinstance(found.get(key), kind)}


def _peek(path: str) -> dict:
    """A checkpoint without reading its tensors."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # damaged files raise almost anything
        return {}
    return found if isinstance(found, dict) else {}


def delete_old_checkpoints(folder: str, newest: str, keep: int) -> None:
    """Of the periodic checkpoints up to ``newest``, just written, leave the last ``keep``.

    Those of higher iterations, left by a run that was taken back, are neither counted nor deleted.
    Final and best ones always stay. Nothing is deleted unless ``newest`` reads back whole.

    Args:
        newest: name of a file of the folder, any checkpoint.
        keep: 0 = all.
    """
    periodic = sorted(x for x in _weight_files(folder) if _PERIODIC.fullmatch(x))
    if _PERIODIC.fullmatch(newest):
        periodic = [x for x in periodic if x <= newest]
    if not keep or len(periodic) <= keep:
        return
    try:
        check_seal(os.path.join(folder, newest))
    except (UserError, OSError) as error:
        logger.warning(f"No old checkpoint is deleted, because {newest} reads back wrong: {error}")
        return
    for name in periodic[:-keep]:
        with suppress(FileNotFoundError):  # someone was faster
            os.remove(os.path.join(folder, name))
        logger.info(f"Deleted {name} (SOLVER.KEEP_CHECKPOINTS {keep})")


def check_unused(folder: str) -> None:
    """Refuse to start anew where another run has left checkpoints.

    Raises:
        UserError: names them and the ways out.
    """
    names = _own_files(folder)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(
            f"OUTPUT_DIR {folder} holds another run ({shown}). Add --resume to continue it, choose "
            "another OUTPUT_DIR, or add --overwrite to delete it"
        )


@contextmanager
def config_kept(folder: str) -> Iterator[Callable[[], None]]:
    """Inside, config.yaml may be rewritten; an error brings the old one back.

    A run that is refused must not change the record of the run that it was refused for.

    Yields:
        To be called when the run has been accepted; from then on the new one stays.
    """
    path = os.path.join(folder, "config.yaml")
    before = open(path, "rb").read() if os.path.exists(path) else None
    accepted: List[bool] = []
    try:
        yield lambda: accepted.append(True)
    except BaseException:
        if before is not None and not accepted:
            atomic_write(path, lambda file: file.write(before))
        raise


def delete_run(folder: str) -> None:
    """Delete the checkpoints and records of a run, and nothing else.

    The pointer goes first, the newest checkpoint last: a kill in between leaves a smaller run.
    """
    names = _own_files(folder)
    records = [x for x in _RECORDS if names and os.path.exists(os.path.join(folder, x))]
    for name in records + names:
        os.remove(os.path.join(folder, name))
    if names:
        logger.warning(f"--overwrite: deleted {', '.join(records + names)} of {folder}")


def _own_files(folder: str) -> List[str]:
    if not os.path.isdir(folder):
        return []
    return sorted(x for x in os.listdir(folder) if _OWN.fullmatch(x))
