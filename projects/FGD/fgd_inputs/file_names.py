"""Where the images of a COCO JSON lie: what tools write as ``file_name``, and the folder."""

import os
from typing import Callable, Dict, List, Sequence
from urllib.parse import unquote

from .errors import UserError
from .json_file import shown

_SAMPLED = 100  # looking up all 118k files of COCO takes minutes on a network drive

Reading = Callable[[str], str]


def image_folder(json_file: str, given: str = "") -> str:
    """The folder that file names are relative to, absolute.

    ``given``, or "images" beside the JSON or beside the folder that it is in, or its own folder.
    """
    if given:
        return os.path.abspath(os.path.expanduser(given))
    own = os.path.dirname(os.path.abspath(json_file))
    usual = [os.path.join(parent, "images") for parent in (own, os.path.dirname(own))]
    return next((path for path in usual if os.path.isdir(path)), own)


def readings(folder: str) -> Dict[str, Reading]:
    """What is tried, in this order, by what is said of it."""

    def without_folder(name: str) -> str:
        first, _, rest = name.partition("/")
        return rest if rest and first == os.path.basename(folder) else name

    def slashes(name: str) -> str:
        return name.replace("\\", "/")

    return {
        "": lambda name: name,
        "read with / for \\": slashes,
        "read without %-escapes": unquote,
        "read without the name of their folder": lambda name: without_folder(slashes(name)),
        "read without %-escapes and the name of their folder": lambda name: without_folder(
            unquote(slashes(name))
        ),
    }


def find_files(path: str, folder: str, names: Sequence[str], hint: str) -> tuple:
    """How file names are read so that the files are there.

    All names of a file are read alike. Of many, evenly spaced ones are looked up.

    Args:
        path: the JSON. hint: what to set if they lie elsewhere.
    Returns:
        The full paths, in the order of ``names``, and a note on what was read otherwise than it is
        written, "" if nothing.
    Raises:
        UserError: no folder; or a file that no reading finds.
    """
    if not os.path.isdir(folder):
        raise UserError(f"image folder {folder} of dataset JSON {path} does not exist; {hint}")
    sampled = names[:: max(1, len(names) // _SAMPLED)]
    for note, read in readings(folder).items():
        if all(os.path.isfile(os.path.join(folder, read(name))) for name in sampled):
            return _joined(folder, names, read), note and f"file names are {note}"
    missing = next(x for x in sampled if not os.path.isfile(os.path.join(folder, x)))
    raise UserError(f"image {shown(missing)} of dataset JSON {path} is not in {folder}; {hint}")


def _joined(folder: str, names: Sequence[str], read: Reading) -> List[str]:
    return [os.path.join(folder, read(name)) for name in names]
