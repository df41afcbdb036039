"""Files that are complete or not there, and checkpoints that carry their own checksum."""

import glob
import hashlib
import logging
import os
import tempfile
from typing import IO, Any, Callable

import torch

from .errors import UserError

_TEMPORARY = ".tmp_fgd_"
# The comment of a checkpoint's zip archive: readers skip it, so it needs no second file that could
# be lost or belong to another save.
_SEAL = b"fgd-sha256:"
_SEAL_LENGTH = len(_SEAL) + 64

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
        with open(temporary, "w+b") as file:
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


def save_sealed(data: dict, file: IO[bytes]) -> None:
    """``torch.save`` to an empty file open for reading and writing, then the SHA-256 of it all."""
    torch.save(data, file)
    file.seek(-2, os.SEEK_END)  # the zip format's last field: the length of the comment
    file.write(_SEAL_LENGTH.to_bytes(2, "little"))
    file.seek(0)
    digest = _sha256(file)
    file.seek(0, os.SEEK_END)
    file.write(_SEAL + digest.encode())


def check_seal(path: str) -> bool:
    """Whether the file carries its checksum. Others, from elsewhere or earlier versions, do not.

    Raises:
        UserError: it does, and not one bit of the file may differ from what was written.
    """
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END) - _SEAL_LENGTH
        if length < 0:
            return False
        file.seek(length)
        seal = file.read()
        if not seal.startswith(_SEAL):
            return False
        file.seek(0)
        if _sha256(file, length) != seal[len(_SEAL) :].decode("latin1"):
            raise UserError("damaged: its content is not what its SHA-256 was computed from")
    return True


def file_sha256(path: str) -> str:
    """In hexadecimal."""
    with open(path, "rb") as file:
        return _sha256(file)


def _sha256(file: IO[bytes], length: int = -1) -> str:
    """Of the next ``length`` bytes, or of all that follow."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20 if length < 0 else min(length, 1 << 20)):
        digest.update(block)
        length -= len(block) if length >= 0 else 0
    return digest.hexdigest()


def check_output_dir(path: str, key: str = "OUTPUT_DIR") -> None:
    """Create a folder and write to it once; UserError if that fails. ``key``: what names it."""
    if not path or "://" in path:
        raise UserError(f"{key}: {path!r} is not a local folder")
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{key} {path}: cannot write there ({error.strerror})") from None
