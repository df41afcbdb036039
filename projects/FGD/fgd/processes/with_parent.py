"""A command that ends with the process that started it, however that ends.

Run as a file, so that it acts before anything is imported that takes time.
"""

import ctypes
import os
import signal
import sys
from typing import List, Sequence

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def with_parent(words: Sequence[str]) -> List[str]:
    """The command line of a command that the kernel kills when this process has ended.

    Where there is no Linux it is the same command without that.
    """
    return [sys.executable, "-IS", __file__, str(os.getpid()), *words]


def _become(parent: int, words: Sequence[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be told of
        raise SystemExit(1)
    os.execvp(words[0], words)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
