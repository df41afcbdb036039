"""Writing results: a reader sees the old file or the whole new one. Standard library only."""

import json
import os
from contextlib import suppress
from pathlib import Path

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


def write_json(path, data) -> None:
    """`data` as indented UTF-8 JSON, atomically. ValueError for NaN: no JSON reader takes it."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode("utf-8"))
