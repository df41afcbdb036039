"""One training run per folder at a time."""

import logging
from contextlib import ExitStack, contextmanager
from typing import Iterator

from fgd_inputs.folder_lock import locked

from .together import on_main_process

logger = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: str) -> Iterator[None]:
    """Inside, no other process trains in ``folder``. All ranks enter together.

    The main process holds the lock of `fgd_inputs.folder_lock`.

    Raises:
        UserError: another process holds it; names its pid, machine and start.
    """
    with ExitStack() as held:
        lock = locked(folder, "OUTPUT_DIR", "training run", logger.warning, logger.info)
        on_main_process(lambda: held.enter_context(lock))
        yield
