"""Where the images of a COCO JSON lie: what tools write as ``file_name``, and the folder."""

import os
from pathlib import Path, PurePosixPath
from typing import Callable, Dict, List, Sequence, Tuple
from urllib.parse import unquote

from .errors import UserError
from .json_file import shown

SUFFIXES = (  # of `image_files.FORMATS`
    *(".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".j2k", ".png"),
    *(".pbm", ".pgm", ".ppm", ".tif", ".tiff", ".webp"),
)
_SAMPLED = 100  # looking up all 118k files of COCO takes minutes on a network drive

Reading = Callable[[str], str]


def image_folder(json_file: str, given: str = "") -> str:
    """The folder that file names are relative to, absolute.

    ``given``, or the first of these: "images" beside the JSON, its own folder where images lie in
    it, "images" beside its own folder, its own folder.
    """
    if given:
        return os.path.abspath(os.path.expanduser(given))
    own = os.path.dirname(os.path.abspath(json_file))
    beside, above = (os.path.join(parent, "images") for parent in (own, os.path.dirname(own)))
    if os.path.isdir(beside):
        return beside
    return above if os.path.isdir(above) and not _has_images(own) else own


def _has_images(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(SUFFIXES) for entry in entries)
    except OSError:
        return False


def readings(folder: str, subset: str = "") -> Dict[str, Reading]:
    """What is tried, in this order, by what is said of it.

    Args:
        subset: the folder inside ``folder`` that holds the images of this JSON; "" = none.
    """

    def without_folder(name: str) -> str:
        first, _, rest = name.partition("/")
        return rest if rest and first == os.path.basename(folder) else name

    tried: Dict[str, Reading] = {
        "": lambda name: name,
        "read with / for \\": _slashes,
        "read without %-escapes": unquote,
        "read without the name of their folder": lambda name: without_folder(_slashes(name)),
        "read without %-escapes and the name of their folder": lambda name: without_folder(
            unquote(_slashes(name))
        ),
    }
    if subset:
        tried[f"looked up in {subset}/"] = lambda name: f"{subset}/{unquote(_slashes(name))}"
    tried["read without their folders"] = _last_part
    return tried


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _last_part(name: str) -> str:
    """Of a path or an address. Label Studio writes "/data/local-files/?d=FOLDER/a.png"."""
    address, _, query = _slashes(name).partition("?")
    if query.startswith("d="):
        address = query[2:]
    elif "://" not in address:
        address = _slashes(name)  # a "?" may be part of a name
    return unquote(address).rpartition("/")[2]


def find_files(path: str, folder: str, names: Sequence[str], hint: str) -> Tuple[List[str], str]:
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
    for note, read in readings(folder, _subset(path, folder)).items():
        if all(os.path.isfile(os.path.join(folder, read(name))) for name in sampled):
            paths = [os.path.join(folder, read(name)) for name in names]
            if read is not _last_part or len(set(paths)) == len(set(names)):
                return paths, note and f"file names are {note}"
    missing = next(x for x in sampled if not os.path.isfile(os.path.join(folder, x)))
    raise UserError(f"image {shown(missing)} of dataset JSON {path} is not in {folder}; {hint}")


def _subset(path: str, folder: str) -> str:
    """The folder of "instances_train.json" is "train" where CVAT and Datumaro export images too."""
    stem = Path(path).stem
    parts = stem.split("_")
    ends = ("_".join(parts[i:]) for i in range(len(parts)))
    return next((x for x in ends if x and os.path.isdir(os.path.join(folder, x))), "")


def find_images(paths: Sequence) -> List[Path]:
    """Files as given; of a folder, the images directly in it, by name.

    Raises:
        UserError: a folder holds no image.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"folder {path} holds no image ({', '.join(SUFFIXES)})")
        files += found
    return files


def find_entries(path: str, names: Sequence[str], files: Sequence[str]) -> Tuple[List[int], str]:
    """Which of the images of a JSON each file is: the one whose name the file's path ends in.

    Args:
        path: the JSON. names: as it writes them.
    Returns:
        An index into ``names`` for each of ``files``, and a note as `find_files`.
    Raises:
        UserError: a file is not in the JSON, or more than once.
    """
    ends = [PurePosixPath(_slashes(os.path.abspath(file))).parts for file in files]
    counts: List[int] = []
    for note, read in readings("").items():
        found = _by_end(list(map(read, names)), ends)
        if all(len(own) == 1 for own in found):
            return [own[0] for own in found], note and f"file names are {note}"
        counts = counts or [len(own) for own in found]
    file, count = next((file, n) for file, n in zip(files, counts) if n != 1)
    raise UserError(f"{file} is {count} times among the images of {path}, not once")


def _by_end(names: Sequence[str], ends: Sequence[tuple]) -> List[List[int]]:
    by_last: Dict[str, List[tuple]] = {}
    for i, name in enumerate(names):
        parts = PurePosixPath(name).parts
        by_last.setdefault(parts[-1] if parts else "", []).append((i, parts))
    return [
        [i for i, parts in by_last.get(end[-1], ()) if end[-len(parts) :] == parts] for end in ends
    ]
