"""Training checkpoints: files that stock Detectron2 loads as the plain student, written atomically.

Keys of the file (format "fgd-1"; tensors, numbers, strings, lists and dicts only):
    model         the student's state dict
    distiller     state dict of the trained distillation modules; {} without distillation
    config        yaml that builds the student;   full_config: yaml of the training run
    classes       class names
    teacher       {"weights": as the config names the file, "sha256"}; None without a teacher
    iteration     index of the last finished iteration
    trainer       optimizer, schedule, AMP scaler, data seed, and "loss_normalizers" of each rank
    rng           states of the random number generators, one entry per rank
"""

import glob
import logging
import os
import shutil
from typing import IO, Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from . import compat, rng
from .config import META_ARCHITECTURE, student_config
from .errors import UserError
from .weights import read_weights, weights_sha256
from .yaml_config import parse_yaml

FORMAT = "fgd-1"
_TEMPORARY = ".tmp_fgd_"
_POINTER = "last_checkpoint"

logger = logging.getLogger(__name__)


def atomic_write(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that at any moment ``path`` is the complete old or the complete new one.

    The data is on the disk before the name is: after a power cut no empty file has it. When
    ``write`` fails, the old file is untouched and nothing else is left behind.
    """
    folder, name = os.path.split(os.path.abspath(path))
    # In the same folder: a rename across file systems would be a copy.
    temporary = os.path.join(folder, f"{_TEMPORARY}{os.getpid()}_{name}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # makes the rename itself durable
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: str) -> None:
    """Delete what killed writers left behind. Only for a folder that no other run uses."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"{_TEMPORARY}*")):
        logger.info(f"Removing {path}, left by an interrupted run")
        os.remove(path)


def last_checkpoint(folder: str) -> str:
    """Path of the checkpoint that ``last_checkpoint`` names; "" when the folder has none at all.

    Raises:
        UserError: there are checkpoints but no pointer, or it names no checkpoint of this folder.
    """
    pointer = os.path.join(folder, _POINTER)
    present = sorted(glob.glob("*.pth", root_dir=folder))
    advice = (
        f"Checkpoints there: {', '.join(present) or 'none'}; write the name of the one to continue "
        "from into that file"
    )
    if not os.path.isfile(pointer):
        if present:
            raise UserError(f"--resume: {pointer} is missing. {advice}")
        return ""
    with open(pointer, errors="replace") as file:
        name = file.read().strip()
    if name not in present:
        raise UserError(f"--resume: {pointer} names {name!r}, which is not there. {advice}")
    return os.path.join(folder, name)


def student_of(model: nn.Module) -> nn.Module:
    """The plain detector inside DDP and Distiller, or the model itself."""
    model = compat.unwrap(model)
    return getattr(model, "student", model)


def describe_run(cfg: CfgNode) -> dict:
    """The parts of a checkpoint that do not change during a run; they travel with the weights."""
    classes: List[str] = []
    if cfg.DATASETS.TRAIN:
        classes = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", []))
    return {
        "format": FORMAT,
        "config": student_config(cfg).dump(),
        "full_config": cfg.dump(),
        "classes": classes,
        "teacher": _describe_teacher(cfg),
    }


def _describe_teacher(cfg: CfgNode) -> Optional[Dict[str, str]]:
    """Which file taught, so that a deployed student can be traced back to it; None: no teacher."""
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        return None
    path = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS
    return {"weights": path, "sha256": weights_sha256(path)}


class TrainingCheckpointer(DetectionCheckpointer):
    """Saves and resumes a run; also a drop-in for Detectron2's checkpointer (its load is safe).

    Args:
        model: the trained model: plain or Distiller, in DDP or not.
        save_dir: OUTPUT_DIR, a local folder.
        header: constant entries of each file (`describe_run`).
        trainer: has ``state_dict`` and ``load_state_dict``; without it only weights are saved.
    """

    def __init__(self, model: nn.Module, save_dir: str, *, header: dict, trainer=None):
        super().__init__(model, save_dir)
        self.header, self.trainer = header, trainer
        self.student = student_of(model)
        self.distillation = getattr(compat.unwrap(model), "distillation", None)

    def save(self, name: str, **extra) -> None:
        """Write ``{name}.pth``, then point `last_checkpoint` at it. All ranks call it together.

        Raises:
            UserError: the file cannot be written. Earlier files and the pointer are as before.
        """
        ranks = comm.gather((rng.get_state(), loss_normalizers(self.student)))
        if not (self.save_dir and self.save_to_disk):
            return
        data = {**self.header, "model": self.student.state_dict(), **extra}
        data["distiller"] = self.distillation.state_dict() if self.distillation else {}
        data["rng"] = [state for state, _ in ranks]
        if self.trainer is not None:
            data["trainer"] = self.trainer.state_dict()
            data["trainer"]["loss_normalizers"] = [normalizers for _, normalizers in ranks]
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info(f"Saving checkpoint to {path}")
        try:
            atomic_write(path, lambda file: torch.save(data, file))
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(self.save_dir).free / 2**20
            raise UserError(
                f"cannot write {path}: {' '.join(str(error).split())} ({free:.0f} MB are free). "
                "Earlier checkpoints are intact; make room and continue with --resume"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        text = last_filename_basename.encode()
        atomic_write(os.path.join(self.save_dir, _POINTER), lambda file: file.write(text))

    def get_checkpoint_file(self) -> str:
        return last_checkpoint(self.save_dir)

    def forget_earlier_run(self) -> None:
        """Drop the pointer of a run that gets replaced: --resume must never mix the two."""
        pointer = os.path.join(self.save_dir, _POINTER)
        if self.save_to_disk and os.path.exists(pointer):
            logger.warning(
                f"{self.save_dir} holds an earlier run. This one starts anew and overwrites files "
                "of the same names (--resume would have continued it)"
            )
            os.remove(pointer)

    def _load_file(self, filename: str) -> dict:
        return read_weights(filename)

    def resume(self, path: str) -> None:
        """Restore model, distillation modules, trainer and random numbers from a file of `save`.

        Raises:
            UserError: not such a file, damaged, or it does not fit this config.
        """
        logger.info(f"Resuming from {path}")
        data = read_weights(path)
        if data.get("format") != FORMAT or "trainer" not in data:
            raise UserError(
                f"--resume: {path} holds no training state of this project; to start from its "
                "weights pass MODEL.WEIGHTS instead"
            )
        for change in config_changes(data["full_config"], self.header["full_config"]):
            logger.warning(f"--resume with another config: {change}")
        before, now = (run.get("teacher") or {} for run in (data, self.header))
        if before and now and before["sha256"] != now["sha256"]:
            logger.warning(
                f"--resume with another teacher: the content of {now['weights']} is not what it was"
            )
        try:
            self.student.load_state_dict(data["model"])
            if self.distillation:
                self.distillation.load_state_dict(data["distiller"])
            self.trainer.load_state_dict(data["trainer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"--resume: {path} does not fit this config ({' '.join(str(error).split())}); "
                "continue with the config.yaml beside it"
            ) from error
        self._resume_rank(data)

    def _resume_rank(self, data: dict) -> None:
        processes, rank = len(data["rng"]), comm.get_rank()
        if processes != comm.get_world_size():
            logger.warning(
                f"The run had {processes} processes and has {comm.get_world_size()} now: it goes "
                "on, but not with the same random numbers and images"
            )
            return
        rng.set_state(data["rng"][rank])
        for name, value in data["trainer"]["loss_normalizers"][rank].items():
            self.student.get_submodule(name).loss_normalizer = value


def config_changes(before: str, after: str) -> List[str]:
    """Keys whose values differ between two config texts, as "KEY: before -> after"."""
    old, new = (dict(_flatten(parse_yaml(text, "config"))) for text in (before, after))
    keys = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def _flatten(node: dict, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def loss_normalizers(model: nn.Module) -> dict:
    """Running numbers of foreground anchors, by module name.

    RetinaNet and FCOS divide their losses by this average and keep it as a plain attribute, which
    no state dict has.
    """
    values = {name: getattr(x, "loss_normalizer", None) for name, x in model.named_modules()}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
