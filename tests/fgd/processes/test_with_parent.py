"""A command that ends with the process that started it, also when that is killed."""

import os
import signal
import subprocess
import sys
import time

from fgd.processes import with_parent as module

PARENT = """
import runpy, subprocess, sys, time
with_parent = runpy.run_path(sys.argv[1])["with_parent"]
script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
subprocess.Popen(with_parent([sys.executable, "-c", script]))
time.sleep(60)
"""


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_sigkill_leaves_nothing_behind():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, module.__file__], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(child)


def test_otherwise_it_is_the_command():
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a b", "$x"]
    done = subprocess.run(module.with_parent(words), capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (7, "['a b', '$x']")


def test_it_does_not_start_for_a_parent_that_is_gone():
    words = module.with_parent([sys.executable, "-c", "print('started')"])
    words[words.index(str(os.getpid()))] = "1"
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
