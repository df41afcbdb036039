"""Signals that ask a run to stop: they set a flag, and the run looks at it where it can stop.

SIGTERM (schedulers, `kill`), SIGUSR1 (Slurm's --signal) and SIGINT (Ctrl-C) mean the same. A second
SIGINT ends the process at once, with exit code 130 and nothing saved.
"""

import os
import signal
import threading
from contextlib import contextmanager
from typing import Callable, Iterator, List

from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

from ..errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AT_ONCE = 130  # the shell's exit code of a process that SIGINT ended

_received: List[signal.Signals] = []
_last_acts: List[Callable[[], None]] = []


def requested() -> str:
    """Name of the first signal since `listening` began, "" if none came or nobody listens."""
    return _received[0].name if _received else ""


def agreed() -> str:
    """The signal that any process of the job has received, the same on all; "" if there is none.

    A collective: every process calls it.
    """
    return next(filter(None, comm.all_gather(requested())), "")


@contextmanager
def listening() -> Iterator[None]:
    """Inside, the three signals only set the flag; the handlers of before come back afterwards.

    Without effect outside of the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _receive) for number in SIGNALS}
    # A process that `launch` has started was given them blocked, until it could take them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _receive(number: int, frame) -> None:
    received = signal.Signals(number)
    if received is signal.SIGINT and received in _received:
        for act in _last_acts:
            act()
        os._exit(AT_ONCE)
    _received.append(received)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, the signals wait; processes started here get them once they are `listening`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def at_once(act: Callable[[], None]) -> Iterator[None]:
    """Inside, a second SIGINT calls ``act`` before it ends the process."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


class StopBetweenSteps(HookBase):
    """Ends training on all processes after the step in which one was asked to stop.

    Belongs after the hook that saves and before the one that evaluates. After the last step
    nothing is left to stop but the evaluation, which looks by itself.

    Raises:
        StoppedError
    """

    def before_train(self):
        self._stop(agreed())

    def after_step(self):
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self._stop(self.trainer.stop_signal)

    def _stop(self, name: str) -> None:
        if name:
            raise StoppedError(f"stopped by {name}")
