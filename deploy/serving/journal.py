"""Journal: what a run over many files has finished, so that a killed one can go on. Stdlib only."""

import json
import os
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

from deploy.errors import UserError
from deploy.files import content_sha256, json_bytes, write_atomically
from fgd_inputs.json_file import shown

# what reading it meets when it is damaged, or another file
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Note(NamedTuple):
    """A finished file: what was found in it; by the SHA-256 of what (`made_of`); and the picture
    that was written of it, relative to the journal's folder, None without."""

    file: Path
    made_of: str
    picture: Optional[str]
    entry: Dict[str, Any]


class Journal:
    """A file of JSON lines: first the settings of the run, then one line per finished file.

    Each line names the model that made it. A line that a kill cut off is dropped. A file counts as
    finished while what it was made of and its picture still have the content that they had.

    Args:
        path: of the journal.
        settings: what the results depend on; JSON. "model" is the model.
        resume: go on with the journal at `path`, if there is one; else it is begun anew.
    Raises:
        UserError: the journal was begun with other settings, is damaged or cannot be written.
    """

    def __init__(self, path, settings: Dict[str, Any], resume: bool = False):
        self.path, self._model = Path(path), settings["model"]
        self._finished: Dict[Tuple[str, Optional[str]], Dict[str, Any]] = {}
        if resume and self.path.exists():
            self._read(settings)
        else:
            write_atomically(self.path, json_bytes(settings))

    def entry(self, file: Path, made_of: str, picture: Optional[str]) -> Optional[Dict[str, Any]]:
        """What was noted for a file; None if nothing was, or any of it is another by now."""
        line = self._finished.get((str(file), picture))
        if (
            line is None
            or line["made_of"] != made_of
            or line["picture_sha256"] != self._sha256(picture)
        ):
            return None
        return line["entry"]

    def add(self, notes: Sequence[Note]) -> None:
        """Note finished files: with the system when this returns, so that no kill undoes it.

        Not forced to the disk, which could take longer than the detection: after a power cut the
        last files are done again.
        """
        lines = b"".join(
            json_bytes(
                {
                    "file": str(note.file),
                    "model": self._model,
                    "made_of": note.made_of,
                    "picture": note.picture,
                    "picture_sha256": self._sha256(note.picture),
                    "entry": note.entry,
                }
            )
            for note in notes
        )
        try:
            with open(self.path, "ab") as journal:
                journal.write(lines)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _sha256(self, picture: Optional[str]) -> Optional[str]:
        return None if picture is None else content_sha256(self.path.parent / picture)

    def _read(self, settings: Dict[str, Any]) -> None:
        try:
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            before, *lines = map(json.loads, content[:whole].splitlines())
            changed = [
                f"{key} {shown(before.get(key))}, now {shown(value)}"
                for key, value in settings.items()
                if before.get(key) != value
            ]
            for number, line in enumerate(lines, 2):
                if line["model"] != before["model"]:
                    raise ValueError(f"line {number} is of another model than the first line")
                if not isinstance(line["entry"], dict) or not {"made_of", "picture_sha256"} <= set(
                    line
                ):
                    raise ValueError(f"line {number} is none of ours")
                self._finished[line["file"], line["picture"]] = line
            if whole < len(content) and not changed:
                os.truncate(self.path, whole)
        except _UNREADABLE as error:
            raise UserError(
                f"cannot resume from {self.path}: {error}; leave out --resume to start over"
            ) from error
        if changed:
            raise UserError(
                f"{self.path} was begun with {'; '.join(changed)}: repeat the command as it was, "
                "or leave out --resume to start over"
            )
