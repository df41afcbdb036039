"""One training run per folder at a time."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import contextmanager
from typing import IO, Iterator, List

from ..errors import UserError
from .together import on_main_process

_LOCK = ".fgd_lock"

logger = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: str) -> Iterator[None]:
    """Inside, no other process trains in ``folder``. All ranks enter together.

    The main process holds a lock of the operating system, which ends with the process however that
    ends; the file around it stays and says who holds it.

    Raises:
        UserError: another process holds it; names its pid, machine and start.
    """
    held: List[IO[str]] = []
    on_main_process(lambda: held.extend(_acquire(os.path.join(folder, _LOCK))))
    try:
        yield
    finally:
        for file in held:
            file.truncate(0)  # left in order
            file.close()


def _acquire(path: str) -> List[IO[str]]:
    """The locked file; none where the file system has no locks."""
    file = open(path, "a+")
    try:
        # Not flock: DataLoader workers would inherit that one and outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(file)
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"OUTPUT_DIR {os.path.dirname(path)} is in use by another training run "
                f"({owner or 'it has just started'}). Wait for it, stop it, or choose another "
                "OUTPUT_DIR"
            ) from None
        logger.warning(
            f"{path} cannot be locked ({error.strerror}): nothing prevents a second run from "
            "writing to the same OUTPUT_DIR"
        )
        return []
    _say_if_stale(path, _owner(file))
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
    file.flush()
    return [file]


def _owner(file: IO[str]) -> str:
    """ "pid 12 on HOST since ...", or "" if the file does not say."""
    file.seek(0)
    try:
        return "pid {pid} on {host} since {since}".format(**json.load(file))
    except (ValueError, KeyError, TypeError):
        return ""


def _say_if_stale(path: str, owner: str) -> None:
    """The lock is ours, yet someone stands in the file: a run that was killed, or an unseen one."""
    if not owner:
        return
    if f" on {socket.gethostname()} " in owner:
        logger.info(f"The run before this one ({owner}) was killed; its lock is gone")
        return
    logger.warning(
        f"{path}: the run before this one ({owner}) did not end in order. If it is still running "
        "on that machine, stop one of the two: this file system may not share locks between "
        "machines"
    )
