"""Image files by their content: which are equal, and whether a set is still the one it was.

Cheap for sets of COCO's size: of all files the size is looked up, of few the content is read.
"""

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

_THREADS = 16  # a network drive answers many questions in the time of one
_PORTION = 64  # files
_READ = 64 * 2**20  # bytes of a set that its digest is made of, beside the sizes
_PIECE = 4096  # bytes at three places, which tell apart nearly all files of one size
_COMPARED = 2**30  # bytes of files alike in these that are read whole at most


class ImageFile(NamedTuple):
    """A file as the disk knows it; where there is none, ``size`` is -1 and ``place`` its path."""

    path: str
    size: int
    place: Any  # equal for two names of one file


def look_up(paths: Sequence[str]) -> List[ImageFile]:
    """Size and place of every file; an address such as https://... is none."""
    return _each(_look_up, paths)


def _each(function: Callable, values: Sequence[Any]) -> List[Any]:
    """Its result for every value, in threads, a portion for each at a time."""
    portions = [values[i : i + _PORTION] for i in range(0, len(values), _PORTION)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [x for part in pool.map(lambda part: [*map(function, part)], portions) for x in part]


def _look_up(path: str) -> ImageFile:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        return ImageFile(path, -1, path)
    return ImageFile(path, found.st_size, (found.st_dev, found.st_ino))


def set_digest(files: Sequence[ImageFile]) -> str:
    """SHA-256 in hexadecimal of a set: the size of every file, in this order, and content.

    Of sets of up to 64 MiB the content of all files counts, of larger ones that of evenly spaced
    files of as many bytes. Names, places and times do not count: a set may be moved and copied. So
    in a large set a file that was replaced by another one of its very size may pass unseen.
    """
    digest = hashlib.sha256(" ".join(str(file.size) for file in files).encode())
    step = max(1, -(-sum(max(file.size, 0) for file in files) // _READ))
    for content in _each(_whole, [file for file in files if file.size >= 0][::step]):
        digest.update(content)
    return digest.hexdigest()


def equal_files(first: Sequence[ImageFile], second: Sequence[ImageFile]) -> Dict[int, int]:
    """Index of each file of ``first`` that is in ``second`` too → its index there.

    Equal are two names of one file, and files of the same bytes. Where those that may be equal have
    more than 1 GiB in either set, size and bytes at three places decide.
    """
    places = {file.place: i for i, file in enumerate(second) if file.size > 0}
    found = {i: places[file.place] for i, file in enumerate(first) if file.place in places}
    ours = [i for i, file in enumerate(first) if i not in found and file.size > 0]
    theirs = [i for i, file in enumerate(second) if file.size > 0]
    keys: List[Dict[int, Any]] = [{}, {}]
    for key in (None, _pieces, _whole):  # None: the size alone
        if key is _whole and max(_bytes(first, ours), _bytes(second, theirs)) > _COMPARED:
            break
        keys = [_keys(key, x, of) for x, of in ((first, ours), (second, theirs))]
        alike = set(keys[0].values()) & set(keys[1].values())
        ours, theirs = ([i for i in own if own[i] in alike] for own in keys)
    match = {keys[1][i]: i for i in theirs}
    return dict(sorted({**found, **{i: match[keys[0][i]] for i in ours}}.items()))


def _keys(key: Any, files: Sequence[ImageFile], chosen: List[int]) -> Dict[int, Any]:
    more = _each(key, [files[i] for i in chosen]) if key else [b""] * len(chosen)
    return {i: (files[i].size, x) for i, x in zip(chosen, more)}


def _bytes(files: Sequence[ImageFile], chosen: List[int]) -> int:
    return sum(files[i].size for i in chosen)


def _pieces(file: ImageFile) -> bytes:
    """Of its start, middle and end."""
    return _hashed(file, [0, max(0, file.size // 2), max(0, file.size - _PIECE)], _PIECE)


def _whole(file: ImageFile) -> bytes:
    return _hashed(file, [0], max(file.size, 0))


def _hashed(file: ImageFile, places: Sequence[int], length: int) -> bytes:
    """SHA-256 of so many bytes at each place; of a file that cannot be read that of its path."""
    digest = hashlib.sha256()
    try:
        with open(file.path, "rb") as opened:
            for place in places:
                opened.seek(place)
                left = length
                while left > 0 and (block := opened.read(min(left, 2**20))):
                    digest.update(block)
                    left -= len(block)
    except (OSError, ValueError):
        return hashlib.sha256(repr(file.path).encode()).digest()
    return digest.digest()
