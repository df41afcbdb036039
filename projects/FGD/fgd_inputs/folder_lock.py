"""One run per folder at a time, for training and prediction. Standard library only."""

import errno
import json
import os
import socket
import time
from contextlib import contextmanager
from typing import IO, Callable, Iterator, Set

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK = ".fgd_lock"
_held: Set[str] = set()  # files of this process, which the system's lock does not keep from itself


@contextmanager
def locked(
    folder: str, option: str, run: str, warn: Callable[[str], None], note: Callable[[str], None]
) -> Iterator[None]:
    """Inside, no other run writes to ``folder``, which is there.

    A lock of the operating system, which ends with the process however that ends; the file around
    it stays and says who holds it.

    Args:
        option: what the folder was given by, as "OUTPUT_DIR". run: what uses it, as "training run".
        warn: is told of a file system without locks, and of a run on another machine that may still
            use the folder. note: of a run that was killed.
    Raises:
        UserError: another run holds it; names its pid, machine and start. Or nothing can be written
            there.
    """
    path = os.path.realpath(os.path.join(folder, _LOCK))
    if path in _held:  # to open the file once more would end its lock
        raise _in_use(folder, option, run, "this process")
    _held.add(path)
    try:
        with _open(path, folder, option) as file:
            if not _acquire(file, path, warn):
                raise _in_use(folder, option, run, _owner(file) or "it has just started")
            _say_if_stale(path, _owner(file), warn, note)
            try:
                _sign(file)
                yield
            finally:
                file.truncate(0)  # left in order
    finally:
        _held.remove(path)


def _open(path: str, folder: str, option: str) -> IO[str]:
    try:
        return open(path, "a+")
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot write there ({error.strerror})") from None


def _in_use(folder: str, option: str, run: str, owner: str) -> UserError:
    return UserError(
        f"{option} {folder} is in use by another {run} ({owner}). Wait for it, stop it, or choose "
        f"another {option}"
    )


def _acquire(file: IO[str], path: str, warn: Callable[[str], None]) -> bool:
    """Whether nobody else has it. True where the file system has no locks."""
    try:
        # Not flock: DataLoader workers would inherit that one and outlive a killed run by seconds.
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no locks on this system")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        warn(
            f"{path} cannot be locked ({error.strerror}): nothing prevents a second run from "
            "writing to the same folder"
        )
    return True


def _sign(file: IO[str]) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    try:
        file.truncate(0)
        os.write(file.fileno(), text.encode())  # a buffer would be written again when it is closed
    except OSError as error:
        raise UserError(f"cannot write {file.name}: {error.strerror}") from None


def _owner(file: IO[str]) -> str:
    """ "pid 12 on HOST since ...", or "" if the file does not say."""
    try:
        file.seek(0)
        return "pid {pid} on {host} since {since}".format(**json.load(file))
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _say_if_stale(path: str, owner: str, warn, note) -> None:
    """The lock is ours, yet someone stands in the file: a run that was killed, or an unseen one."""
    if f" on {socket.gethostname()} " in owner:
        note(f"The run before this one ({owner}) was killed; its lock is gone")
    elif owner:
        warn(
            f"{path}: the run before this one ({owner}) did not end in order. If it is still "
            "running on that machine, stop one of the two: this file system may not share locks "
            "between machines"
        )
