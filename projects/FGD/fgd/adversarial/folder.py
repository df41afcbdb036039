"""A folder of adversarial images: whose they are, which are done, each file whole or not there."""

import json
import os
from typing import Any, Dict, Iterable, List

from PIL import Image
from torch import Tensor

from fgd_inputs.json_file import read_json

from ..data.second_images import RECORD
from ..errors import UserError
from ..files import atomic_write, remove_stale_temporaries

_TEMPORARY = ".tmp_"  # of `atomic_write`, also of another process that is at work


class Folder:
    """Where images are written; nothing else is ever changed there.

    Args:
        identity: what the images depend on; "teacher" is {"weights", "sha256"}, of which the second
            counts.
    Raises:
        UserError: it holds images of another teacher or other settings, or files of anyone.
    """

    def __init__(self, path: str, identity: Dict[str, Any]):
        self.path, self.identity = path, identity
        os.makedirs(path, exist_ok=True)
        record = os.path.join(path, RECORD)
        if os.path.exists(record):
            self._check(_read(record))
        elif any(not name.startswith(_TEMPORARY) for name in os.listdir(path)):
            raise UserError(
                f"{path} holds files and no {RECORD}; adversarial images get a folder of their own"
            )
        else:
            self.write_record([])

    def _check(self, found: Dict[str, Any]) -> None:
        changes = _changes(found, self.identity)
        if changes:
            raise UserError(
                f"{self.path} holds adversarial images of other settings: {'; '.join(changes)}. "
                "Choose another --output, or delete that folder"
            )

    def remove_temporaries(self) -> None:
        """Those that a killed process left. Only if no other process writes here."""
        for parent, _, _ in os.walk(self.path):
            remove_stale_temporaries(parent)

    def has(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.path, name))

    def save(self, name: str, pixels: Tensor) -> None:
        """Write (3, H, W) uint8 RGB as a PNG, without loss."""
        path = os.path.join(self.path, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        atomic_write(path, lambda file: image.save(file, format="PNG"))

    def write_record(self, names: Iterable[str]) -> List[str]:
        """Write whose images these are, and which of ``names`` are there; returns those."""
        done = [name for name in names if self.has(name)]
        text = json.dumps({**self.identity, "images": done}, indent=1)
        atomic_write(os.path.join(self.path, RECORD), lambda file: file.write(text.encode()))
        return done


def _read(path: str) -> Dict[str, Any]:
    try:
        content = read_json(path, "record")
        teacher, settings = content["teacher"], content["settings"]
        names = {"weights": str(teacher["weights"]), "sha256": str(teacher["sha256"])}
        return {"teacher": names, "settings": dict(settings), "datasets": content["datasets"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from None


def _changes(found: Dict[str, Any], now: Dict[str, Any]) -> List[str]:
    """What differs, as "KEY: before -> now"."""
    before, after = ({**x["settings"], "datasets": x["datasets"]} for x in (found, now))
    changes = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    teachers = [x["teacher"] for x in (found, now)]
    if teachers[0]["sha256"] != teachers[1]["sha256"]:
        names = [f"{x['weights']} (SHA-256 {x['sha256'][:8]}...)" for x in teachers]
        changes.insert(0, f"teacher: {' -> '.join(names)}")
    return changes
