"""DataLoader workers: started alike everywhere, ended with their process, and on the clock."""

import os
import signal
import threading
from typing import Callable, Iterator

from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torch.utils.data import DataLoader

from ..errors import UserError
from ..processes.stop import SIGNALS

# How they are started, whatever Python's default is. Those of a "forkserver" (the default from
# 3.14) have it for a parent, and both outlive a trainer that was killed.
_START = "fork"


def check_timeout(seconds: float) -> float:
    """DATALOADER.TIMEOUT if it can be one; else UserError."""
    if not 0 <= seconds < float("inf"):
        raise UserError(f"DATALOADER.TIMEOUT: {seconds} is not a number of seconds (0: no limit)")
    return seconds


def supervise(loader: DataLoader, timeout: float) -> DataLoader:
    """Shield a loader's workers, and let it fail after ``timeout`` seconds without a batch.

    0 waits for ever. Without workers nothing is changed: this process reads, and nobody else
    notices when it hangs.
    """
    if loader.num_workers:
        loader.worker_init_fn = shield_worker
        loader.multiprocessing_context = _START
        loader.timeout = check_timeout(timeout)
    return loader


def shield_worker(worker_id: int) -> None:
    """``worker_init_fn`` of a DataLoader: only the process that it loads for can end a worker.

    Ctrl-C and schedulers signal workers too, and the step that is to be finished needs their
    batch. When that process dies, however it does, the kernel kills the worker.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def supervised_batches(
    loader: DataLoader, awaited: Callable[[], str] = lambda: "a batch"
) -> Iterator:
    """The batches of a loader; when they end, by an error too, its workers end at once.

    By itself an error keeps the loader's iterator alive in its traceback. As cyclic garbage that
    fails to reach its workers and waits 5 s for each of them.

    Args:
        awaited: what the next batch is, for the message.
    Raises:
        UserError: the workers hang, see `supervise`.
    """
    batches = iter(loader)
    try:
        yield from batches
    except RuntimeError as error:
        if "timed out after" not in str(error):
            raise
        for worker in batches._workers:
            worker.terminate()  # asked to finish its batch it would not answer
        raise UserError(
            f"the DataLoader's workers have not read {awaited()} within {loader.timeout:g} s "
            "(DATALOADER.TIMEOUT); does a disk or network file system hang?"
        ) from error
    finally:
        if loader.num_workers:
            batches._shutdown_workers()
