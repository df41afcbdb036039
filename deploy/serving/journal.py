"""Journal: what a run over many files has finished, so that a killed one can go on. Stdlib only."""

import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from deploy.errors import UserError
from deploy.files import write_atomically


class Journal:
    """A file of JSON lines: first the settings of the run, then one line per finished file.

    A line that a kill cut off is dropped. A file that has changed since counts as not finished.

    Args:
        path: of the journal.
        settings: what the results depend on; JSON.
        resume: go on with the journal at `path`, if there is one; else it is begun anew.
    Raises:
        UserError: the journal was begun with other settings, is damaged or cannot be written.
    """

    def __init__(self, path, settings: Dict[str, Any], resume: bool = False):
        self.path = Path(path)
        self._finished: Dict[str, Tuple[List[int], Dict[str, Any]]] = {}
        if resume and self.path.exists():
            self._read(settings)
        else:
            write_atomically(self.path, _line(settings))

    def entry(self, file: Path) -> Optional[Dict[str, Any]]:
        """What was noted for a file; None if nothing was, or the file is another by now."""
        stamp, entry = self._finished.get(str(file), (None, None))
        return entry if stamp is not None and stamp == _stamp(file) else None

    def add(self, entries: Sequence[Tuple[Path, Dict[str, Any]]]) -> None:
        """Note finished files: with the system when this returns, so that no kill undoes it.

        Not forced to the disk, which could take longer than the detection: after a power cut the
        last files are done again.
        """
        lines = b"".join(
            _line({"file": str(file), "stamp": _stamp(file), "entry": entry})
            for file, entry in entries
        )
        try:
            with open(self.path, "ab") as journal:
                journal.write(lines)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _read(self, settings: Dict[str, Any]) -> None:
        try:
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            before, *lines = map(json.loads, content[:whole].splitlines())
            self._finished = {line["file"]: (line["stamp"], line["entry"]) for line in lines}
            if whole < len(content):
                os.truncate(self.path, whole)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"cannot resume from {self.path}: {error}; leave out --resume to start over"
            ) from error
        changed = [
            f"{key} {before.get(key)!r}, now {value!r}"
            for key, value in settings.items()
            if before.get(key) != value
        ]
        if changed:
            raise UserError(
                f"{self.path} was begun with {'; '.join(changed)}: repeat the command as it was, "
                "or leave out --resume to start over"
            )


def _line(data: Dict[str, Any]) -> bytes:
    return (json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _stamp(file: Path) -> Optional[List[int]]:
    """Size and time of change of a file; None if it is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
