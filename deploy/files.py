"""Writing results: a reader sees the old file or the whole new one. Standard library only."""

import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Optional

from deploy.errors import UserError


def make_folder(path) -> None:
    """Make a folder and its parents; fine if it is there. UserError if that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {path}: {error.strerror or error}") from error


def write_atomically(path, content: bytes) -> None:
    """Write beside `path`, flush to disk, rename. UserError if that fails; the old file stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    make_folder(path.parent)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def unnamed(path, content: bytes) -> Iterator[Path]:
    """Write under a temporary name beside `path`, until it is renamed; else it goes again."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        write_atomically(temporary, content)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, data) -> None:
    """`data` as `json_bytes`, indented, atomically."""
    write_atomically(path, json_bytes(data, indent=1))


def json_bytes(data, indent: Optional[int] = None) -> bytes:
    r"""`data` as JSON in UTF-8. ValueError for NaN: no JSON reader takes it.

    A byte of a file name that is not UTF-8 becomes "\udcXX", as `os.fsencode` takes it back.
    """
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def content_sha256(path) -> Optional[str]:
    """SHA-256 of a file; None if it is no regular one or cannot be read."""
    digest = hashlib.sha256()
    try:
        if not os.path.isfile(path):  # a pipe would be emptied
            return None
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError:
        return None
    return digest.hexdigest()
