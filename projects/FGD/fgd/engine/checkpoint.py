"""Training checkpoints: files that stock Detectron2 loads as the plain student, written atomically.

Keys of the file (format "fgd-1"; tensors, numbers, strings, lists and dicts only):
    model         the student's state dict
    raw           with SOLVER.EMA_DECAY, where "model" is the average: the weights that are trained,
                  those that differ
    distiller     state dict of the trained distillation modules; {} without distillation
    config        yaml that builds the student;   full_config: yaml of the training run
    classes       class names
    teacher       {"weights": as the config names the file, "sha256": of the file}, of weights that
                  timm has fetched "timm:NAME" and the hash of the tensors; None without a teacher
    data          {"annotations", "images"}: digests of the training set that the run began with,
                  see `fgd.data.contents.describe_sets`; None where none is registered
    best          in model_best.pth, see `fgd.engine.best`: "metric", "figure", "iteration", and the
                  digests of the sets that were evaluated
    iteration     index of the last finished iteration
    trainer       optimizer, schedule, AMP scaler, data seed, the last values of what is logged, and
                  "loss_normalizers" of each rank
    rng           states of the random number generators, one entry per rank
    checksum      "sha256": that of all bytes before it ends the file, as the zip archive's comment
"""

import logging
import os
import shutil
from typing import NamedTuple, Optional

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from .. import compat
from ..checkpoint_entries import check_kinds
from ..errors import UserError
from ..files import atomic_write, save_sealed
from ..processes import rng
from ..processes.together import on_every_process, on_main_process
from ..weights import read_weights
from . import run_folder
from .average import Average
from .config_change import check_changes
from .results import BEST

logger = logging.getLogger(__name__)


def student_of(model: nn.Module) -> nn.Module:
    """The plain detector inside DDP and Distiller, or the model itself."""
    model = compat.unwrap(model)
    return getattr(model, "student", model)


class TrainingCheckpointer(DetectionCheckpointer):
    """Saves and resumes a run; also a drop-in for Detectron2's checkpointer (its load is safe).

    Args:
        model: the trained model: plain or Distiller, in DDP or not.
        save_dir: OUTPUT_DIR, a local folder.
        header: entries of each file that stay as they are (`describe_run`).
        trainer: has ``state_dict`` and ``load_state_dict``; without it only weights are saved.
        keep: how many periodic checkpoints to keep; 0 = all.
        average: of the student, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        header: dict,
        trainer=None,
        keep: int = 0,
        average: Optional[Average] = None,
    ):
        super().__init__(model, save_dir)
        self.average = average
        self.header, self.trainer, self.keep = header, trainer, keep
        self.last_saved = -1  # iteration of the file written last
        self.student = student_of(model)
        self.distillation = getattr(compat.unwrap(model), "distillation", None)

    def save(self, name: str, **extra) -> None:
        """Write ``{name}.pth``, then point `last_checkpoint` at it. All ranks call it together.

        Args:
            extra: further entries of the file; "iteration" is one of them.
        Raises:
            UserError: on all ranks: it cannot be written. Earlier files and `last_checkpoint` are
                as before, and nothing else is left behind.
        """
        self._save_together(f"{name}.pth", extra)
        self.last_saved = extra.get("iteration", -1)

    def save_best(self, record: dict) -> None:
        """Write `BEST`, which `last_checkpoint` never names; otherwise as `save`.

        Args:
            record: the file's "best".
        """
        self._save_together(BEST, {"iteration": record["iteration"], "best": record})

    def _save_together(self, name: str, extra: dict) -> None:
        ranks = comm.gather((rng.get_state(), loss_normalizers(self.student)))
        on_main_process(lambda: self._write(name, ranks, extra))

    def _write(self, name: str, ranks: list, extra: dict) -> None:
        if not (self.save_dir and self.save_to_disk):
            return
        data = self._content(ranks, extra)
        path = os.path.join(self.save_dir, name)
        logger.info(f"Saving checkpoint to {path}")
        try:
            atomic_write(path, lambda file: save_sealed(data, file))
            if name != BEST:
                self.tag_last_checkpoint(name)
                run_folder.delete_old_checkpoints(self.save_dir, name, self.keep)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(self.save_dir).free
            raise UserError(
                f"cannot write {path}: {' '.join(str(error).split())} (it needs "
                f"{_tensor_bytes(data) / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free). Earlier "
                "checkpoints are intact; make room and continue with --resume"
            ) from error

    def save_diverged(self, iteration: int) -> str:
        """Write the weights as they are, for a look at them; this rank alone, no collective.

        Returns:
            The file's path. It holds no training state: --resume passes it over.
        Raises:
            OSError, RuntimeError: it cannot be written.
        """
        path = os.path.join(self.save_dir, f"model_diverged_{iteration:07d}.pth")
        data = {**self.header, **self._weights(), "iteration": iteration - 1}
        atomic_write(path, lambda file: save_sealed(data, file))
        return path

    def _weights(self) -> dict:
        distiller = self.distillation.state_dict() if self.distillation else {}
        return {"model": self.student.state_dict(), "distiller": distiller}

    def _content(self, ranks: list, extra: dict) -> dict:
        data = {**self.header, **self._weights(), **extra}
        if self.average is not None:
            averages = self.average.state_dict()
            data["raw"] = {name: data["model"][name] for name in averages}
            data["model"].update(averages)
        data["rng"] = [state for state, _ in ranks]
        if self.trainer is not None:
            data["trainer"] = self.trainer.state_dict()
            data["trainer"]["loss_normalizers"] = [normalizers for _, normalizers in ranks]
        return data

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        run_folder.write_pointer(self.save_dir, last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """Path of the checkpoint that `resume_newest` would take; "" = there is none."""
        found = run_folder.newest_checkpoint(self.save_dir)
        return found[0] if found else ""

    def _load_file(self, filename: str) -> dict:
        return read_weights(filename)

    def resume_newest(self, *, allow_changes: bool = False) -> Optional["Resumed"]:
        """Continue from the newest checkpoint that is whole; None if the folder has none at all.

        All ranks call it together and continue from the same one.

        Raises:
            UserError: there are some and none is whole, or as `resume`.
        """
        data = None

        def choose() -> str:
            nonlocal data
            path, data = run_folder.newest_checkpoint(self.save_dir) or ("", None)
            return path

        path = on_main_process(choose)
        if not path:
            return None
        return on_every_process(lambda: self.resume(path, data, allow_changes=allow_changes))

    def resume(
        self, path: str, data: Optional[dict] = None, *, allow_changes: bool = False
    ) -> "Resumed":
        """Restore model, distillation modules, trainer and random numbers from a file of `save`.

        Args:
            data: the file's content, if it has been read already.
            allow_changes: go on although config, teacher, classes or the number of processes alter
                the training.
        Raises:
            UserError: not such a file, damaged, it does not fit this config, or see
                ``allow_changes``.
        """
        logger.info(f"Resuming from {path}")
        data = data or run_folder.read_checkpoint(path)
        changed = check_changes(
            {**data, "processes": len(data["rng"])},
            {**self.header, "processes": comm.get_world_size()},
            allow=allow_changes,
        )
        try:
            self._resume_student(data)
            if self.distillation:
                _load(self.distillation, data["distiller"])
            self.trainer.load_state_dict(data["trainer"])
            self._resume_rank(data)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"--resume: {path} does not fit this config ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); continue with the config.yaml beside it"
            ) from error
        if not changed and data.get("data"):
            self.header["data"] = data["data"]  # what it began with, should images be others now
        return Resumed(path, data["iteration"], changed)

    def _resume_student(self, data: dict) -> None:
        _load(self.student, data["model"])
        if self.average is not None:
            self.average.restart()
        raw = data.get("raw")
        # What was averaged and no longer is goes on with what was trained. A run that has ended is
        # evaluated, and that is of the file's model.
        if raw and (self.average is not None or data["iteration"] + 1 < self.trainer.max_iter):
            data["model"].update(raw)
            _load(self.student, data["model"])

    def _resume_rank(self, data: dict) -> None:
        if len(data["rng"]) != comm.get_world_size():
            return  # allowed, and said
        rank = comm.get_rank()
        rng.set_state(data["rng"][rank])
        for name, value in data["trainer"]["loss_normalizers"][rank].items():
            self.student.get_submodule(name).loss_normalizer = value


class Resumed(NamedTuple):
    """What a run was continued from."""

    path: str
    iteration: int  # the last finished one
    changed: bool  # whether the training is altered from there on


def _load(module: nn.Module, weights: dict) -> None:
    check_kinds(weights, module.state_dict(), renamed=False)
    module.load_state_dict(weights)


def _tensor_bytes(value) -> int:
    """Bytes of all tensors in nested dicts and lists; nearly all of a checkpoint's size."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_bytes(item) for item in value.values())
    return sum(map(_tensor_bytes, value)) if isinstance(value, list) else 0


def loss_normalizers(model: nn.Module) -> dict:
    """Running numbers of foreground anchors, by module name.

    RetinaNet and FCOS divide their losses by this average and keep it as a plain attribute, which
    no state dict has.
    """
    values = {name: getattr(x, "loss_normalizer", None) for name, x in model.named_modules()}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
