"""Read weight files without executing anything in them, and load them completely or not at all."""

import collections
import hashlib
import os
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Callable, Optional, Sequence

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import _filter_reused_missing_keys
from safetensors.torch import load_file
from torch import nn

from .checkpoint_entries import check_entries, check_kinds
from .errors import UserError
from .files import check_seal, file_sha256

# Everything that numpy arrays, numbers and containers need; numpy 1 and 2 spell their module apart.
_PICKLE_GLOBALS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
for _core in ("numpy.core", "numpy._core"):
    _PICKLE_GLOBALS[f"{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _PICKLE_GLOBALS[f"{_core}.multiarray", "scalar"] = np.float32(0).__reduce__()[0]
    _PICKLE_GLOBALS[f"{_core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, which python 2 compatible pickles use to write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding!r}")
    return text.encode("latin1")


_PICKLE_GLOBALS["_codecs", "encode"] = _encode_latin1


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _PICKLE_GLOBALS[module, name]
        except KeyError:
            raise UserError(f"refused: contains code or objects ({module}.{name})") from None


@dataclass
class LoadReport:
    """What became of each name of a model's state dict when a file was loaded into it."""

    loaded: int
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)  # "name (file shape, model shape)"
    unexpected: list[str] = field(default_factory=list)  # names of the file that the model lacks
    left_out: list[str] = field(default_factory=list)  # the same, where that was to be expected
    nonfinite: list[str] = field(default_factory=list)
    iteration: Optional[int] = None  # of the last training step, where the file says so
    classes: list[str] = field(default_factory=list)  # class names, where the file says so
    config: Optional[str] = None  # yaml of the student's config, where the file says so

    def summary(self) -> str:
        """One line: counts, and the first names of each list that is not empty."""
        parts = [f"{self.loaded} tensors loaded"]
        for title, names in (
            ("not in the file", self.missing),
            ("of another shape", self.mismatched),
            ("with NaN or infinite values", self.nonfinite),
            ("in the file only", self.unexpected),
            ("of the file left out", self.left_out),
        ):
            if names:
                more = ", ..." if len(names) > 3 else ""
                parts.append(f"{len(names)} {title} ({', '.join(names[:3])}{more})")
        return ", ".join(parts)


def read_weights(path: str) -> dict:
    """Content of a weight file; "model" maps names to tensors or arrays, on the CPU.

    Args:
        path: local path or any address of Detectron2 (``detectron2://``, ``https://``,
            ``catalog://``). ``.pkl`` is read as the model zoo's pickle of numpy arrays,
            ``.safetensors`` as what it says, anything else by ``torch.load(weights_only=True)``. A
            bare state dict is accepted. As in Detectron2, "matching_heuristics" marks files whose
            names are shortened.
    Raises:
        UserError: not there, empty, damaged, not a weight file, or it would execute code.
    """
    address, _, heuristics = path.partition("?matching_heuristics=")
    local = _local_path(address)
    try:
        checkpoint = _as_checkpoint(_reader(local)(local), local)
        check_entries(checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if heuristics == "True":
        checkpoint["matching_heuristics"] = True
    return checkpoint


def _reader(path: str) -> Callable[[str], dict]:
    special = {".pkl": _read_pickle, ".safetensors": _read_safetensors}
    return special.get(os.path.splitext(path)[1], _read_torch)


def _local_path(path: str) -> str:
    if not path:
        raise UserError("no weight file given")
    try:
        local = PathManager.get_local_path(path)
        with open(local, "rb") as file:
            head = file.read(64).lstrip().lower()
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot read weights ({error})") from None
    if not head:
        raise UserError(f"{path}: the file is empty")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: this is a web page, not weights; the download went wrong")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: this is a Git LFS pointer; fetch the file itself (git lfs pull)")
    return local


def weights_sha256(path: str) -> str:
    """SHA-256 of a weight file's bytes, in hexadecimal; ``path`` as in `read_weights`.

    A file is read again only when it has changed.

    Raises:
        UserError: not there or empty.
    """
    local = _local_path(path.partition("?matching_heuristics=")[0])
    found = os.stat(local)
    return _hashed(local, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache
def _hashed(path: str, *unchanged: int) -> str:
    return file_sha256(path)


def state_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's names and tensors, in hexadecimal, for weights that are no file."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # numpy has no bfloat16
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_safetensors(path: str):
    try:
        return load_file(path)
    except Exception as error:  # its own error is no subclass of anything useful
        raise UserError(f"damaged or not a safetensors file ({error})") from None


def _read_pickle(path: str):
    with open(path, "rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="latin1").load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can raise almost anything
            raise UserError(f"damaged or not a pickle ({type(error).__name__}: {error})") from None


def _read_torch(path: str):
    sealed = check_seal(path)
    if not sealed:
        _check_archive(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise almost anything, EOFError without a text
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            raise UserError(f"refused: contains code or objects ({forbidden[1]})") from None
        raise UserError(f"damaged or not a PyTorch file ({type(error).__name__})") from None
    if isinstance(data, dict) and "checksum" in data and not sealed:
        raise UserError("damaged: the SHA-256 that ends it is not there")
    return data


def _check_archive(path: str) -> None:
    """Verify the checksums in a .pth archive: torch.load skips them and loads flipped bits."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # the format before torch 1.6, which has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:  # or taken for encrypted
        raise UserError(f"damaged or incomplete ({error})") from None
    if damaged:
        raise UserError(f"damaged: the checksum of {damaged} is wrong; fetch or copy it again")


def _as_checkpoint(data, path: str) -> dict:
    """Detectron2's reading of each kind of file, with "model" always there."""
    if not isinstance(data, dict):
        raise UserError(f"expected a dict of weights, found a {type(data).__name__}")
    if path.endswith(".pkl") and not ("model" in data and "__author__" in data):
        blobs = data.get("blobs", data)  # Caffe2; detection models have "blobs", ImageNet's do not
        if not isinstance(blobs, dict):
            raise UserError("it holds no weights")
        model = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
        data = {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
    elif path.endswith(".pyth") and "model_state" in data:  # pycls
        state = data["model_state"]
        if not isinstance(state, dict):
            raise UserError("it holds no weights")
        model = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
        data = {"model": model, "__author__": "pycls", "matching_heuristics": True}
    elif "model" not in data and isinstance(data.get("state_dict"), dict):
        raise UserError(
            "this looks like an MMDetection or Lightning checkpoint (it has 'state_dict'); "
            "Detectron2's names differ, convert it first"
        )
    elif "model" not in data:
        data = {"model": data}
    return data


def load_complete(
    model: nn.Module,
    path: str,
    *,
    what: str = "teacher",
    allow_partial: bool = False,
    left_out: Optional[Sequence[str]] = None,
    rename: Optional[Callable[[dict], dict]] = None,
) -> LoadReport:
    """Load a weight file into ``model``, with Detectron2's own matching of names.

    Args:
        what: whose weights these are, for messages.
        allow_partial: accept missing and mismatched names, as long as anything was loaded.
        left_out: the modules of the file that the model is built without; other names that the
            model lacks are then not accepted either. None = the file may hold more.
        rename: makes the file's names the model's, in place of Detectron2's matching.
    Raises:
        UserError: anything is missing or has another shape (unless allowed), nothing was loaded,
            or a value is NaN or infinite (never allowed). The model is then partly overwritten.
    """
    checkpoint = read_weights(path)
    if rename is not None:
        checkpoint = {"model": rename(checkpoint["model"])}
    try:
        renamed = bool(checkpoint.get("matching_heuristics"))
        check_kinds(checkpoint["model"], model.state_dict(), renamed=renamed)
        incompatible = DetectionCheckpointer(model)._load_model(checkpoint)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{what} weights {path}: {' '.join(str(error).split())}") from None
    report = _report(model, incompatible)
    report.iteration = checkpoint.get("iteration")
    report.classes = list(checkpoint.get("classes") or [])
    config = checkpoint.get("config")
    report.config = config if isinstance(config, str) else None
    incomplete = report.missing or report.mismatched
    if left_out is not None:
        known = tuple(f"{name}." for name in left_out)
        report.left_out = [name for name in report.unexpected if name.startswith(known)]
        report.unexpected = sorted(set(report.unexpected) - set(report.left_out))
        incomplete = incomplete or report.unexpected
    if report.nonfinite or not report.loaded or (incomplete and not allow_partial):
        raise UserError(
            f"{what} weights {path} do not fit: {report.summary()}. Check that the file belongs to "
            f"the {what}'s config"
        )
    return report


def _report(model: nn.Module, incompatible) -> LoadReport:
    # Not the counter of batch norm: it has no effect unless momentum is None, converted files lack
    # it, and PyTorch sets it by itself in files that state no version.
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    shapes = {
        name: f"{name} {tuple(in_file)} in the file, {tuple(in_model)} in the model"
        for name, in_file, in_model in incompatible.incorrect_shapes
        if name in state
    }
    # Shared tensors count as there under any of their names.
    missing = [
        name
        for name in _filter_reused_missing_keys(model, incompatible.missing_keys)
        if name in state and name not in shapes
    ]
    nonfinite = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    return LoadReport(
        loaded=len(state.keys() - shapes.keys() - set(incompatible.missing_keys)),
        missing=sorted(missing),
        mismatched=sorted(shapes.values()),
        unexpected=sorted(incompatible.unexpected_keys),
        nonfinite=nonfinite,
    )
