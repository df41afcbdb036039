"""Start one process per GPU, several on the CPU, or join those that torchrun started."""

import faulthandler
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from typing import Callable, List, NamedTuple, NoReturn, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from .. import compat
from ..errors import UserError
from . import stop
from .together import OtherProcessError

TIMEOUT = 1800.0  # seconds that a process waits for the others
GRACE = 3.0  # seconds that the others have to end by themselves after the first error
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerError(RuntimeError):
    """The first error of any process: its exit code, one-line message, and traceback text."""

    def __init__(self, message: str, exit_code: int, details: str = ""):
        super().__init__(message)
        self.exit_code, self.details = exit_code, details


def under_torchrun() -> bool:
    """Whether torchrun has started this process as one of a job."""
    return "TORCHELASTIC_RUN_ID" in os.environ and all(key in os.environ for key in _TORCHRUN)


def one_line(error: BaseException) -> str:
    """The message of an error; of one that went through a DataLoader worker, its last line."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def launch(
    main: Callable[..., int],
    args: Tuple = (),
    *,
    device: str,
    processes: int = 1,
    machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    timeout: float = TIMEOUT,
) -> int:
    """Run ``main(*args)`` in every process of the job and return the main one's exit code.

    Under torchrun this process is already one of the job and the counts given here are not used.

    Args:
        main: importable by name, because new processes import it.
        device: MODEL.DEVICE; "cpu" processes talk over gloo, GPU ones over NCCL.
        processes: per machine; one per GPU.
        dist_url: ``tcp://host:port`` of the first machine; "auto" = a free local port.
        timeout: seconds that a process waits for the others, > 0; then the job fails.
    Raises:
        UserError: the counts do not fit the machine.
        WorkerError: a process failed or was asked to stop; no process of this machine is left.
    """
    if under_torchrun():
        return _run_under_torchrun(main, args, device, timeout)
    check_processes(device, processes, machines, machine_rank, dist_url)
    if processes * machines == 1:
        return main(*args)
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    job = (device, processes, machines, machine_rank, dist_url, timeout)
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    resource_tracker.ensure_running()  # starting it later would let the signals through
    with stop.held_back():
        running = mp.spawn(_worker, (main, args, job, errors), nprocs=processes, join=False)
    _watch(running.processes, errors)
    return 0


class _Report(NamedTuple):
    """How a process says why it ends."""

    local_rank: int
    message: str
    exit_code: int
    details: str


def _watch(processes: list, errors) -> None:
    """Return when all have succeeded; pass on a signal to stop; at the first failure end all.

    Raises:
        WorkerError: the cause of the failure, not what followed from it.
    """
    reports: List[_Report] = []
    told = False

    def look(seconds: float) -> List[int]:
        """Exit codes; None of those that run. Looks more often than a full pipe can matter."""
        connection.wait([p.sentinel for p in processes if p.is_alive()], timeout=seconds)
        while not errors.empty():
            reports.append(_Report(*errors.get()))
        return [p.exitcode for p in processes]

    def signal_all(how: str) -> None:
        for process in processes:
            getattr(process, how)()

    with stop.at_once(lambda: signal_all("kill")):
        try:
            codes = look(0.2)
            while not any(codes) and None in codes:
                if stop.requested() and not told:
                    told = True
                    signal_all("terminate")  # SIGTERM, which they take as `stop` says
                codes = look(0.2)
            end = time.monotonic() + GRACE
            while any(codes) and None in codes and time.monotonic() < end:
                codes = look(0.2)
        finally:
            silent = [i for i, p in enumerate(processes) if p.is_alive()]
            _end(processes)
    if any(codes):
        raise _cause(codes, reports, silent)


def _end(processes: list) -> None:
    """Kill those that still run; where they were goes to stderr."""
    alive = [p for p in processes if p.is_alive()]
    for process in alive:
        os.kill(process.pid, signal.SIGUSR2)
    if alive:
        time.sleep(0.5)
    for process in alive:
        process.kill()
        process.join()


def _cause(codes: list, reports: List[_Report], silent: List[int]) -> WorkerError:
    """What happened first, out of errors, deaths and silences of which one brings the next."""
    reports = sorted(reports, key=lambda r: OtherProcessError.__name__ in r.details)
    known = [r for r in reports if r.exit_code != 1]
    dead = [i for i, code in enumerate(codes) if code is not None and code < 0]
    hint = f"; process {', '.join(map(str, silent))} did not answer (stack above)" if silent else ""
    if known:
        return WorkerError(*known[0][1:])
    if dead and codes[dead[0]] != -signal.SIGABRT:
        number = signal.Signals(-codes[dead[0]])
        why = "; was the memory exhausted?" if number is signal.SIGKILL else ""
        return WorkerError(f"process {dead[0]} terminated with signal {number.name}{why}", 1)
    if reports and silent and "timed out" in reports[0].message.lower():
        return WorkerError(
            f"process {silent[0]} hung, its stack is above; the others gave up waiting: "
            f"{reports[0].message}",
            1,
            reports[0].details,
        )
    if reports:
        return WorkerError(reports[0].message + hint, 1, reports[0].details)
    return WorkerError(f"processes ended with exit codes {codes}{hint}", 1)


def check_processes(
    device: str, processes: int, machines: int, machine_rank: int, dist_url: str
) -> None:
    """Raise UserError if the numbers of processes and machines cannot work here."""
    if processes < 1 or machines < 1 or not 0 <= machine_rank < machines:
        raise UserError(
            f"--num-gpus {processes} --num-machines {machines} --machine-rank {machine_rank}: "
            "counts start at 1, the rank is below the number of machines"
        )
    if machines > 1 and not dist_url.startswith("tcp://"):
        raise UserError("several machines need --dist-url tcp://HOST:PORT of the first one")
    gpus = torch.cuda.device_count()
    if torch.device(device).type == "cuda" and processes > gpus:
        raise UserError(f"--num-gpus {processes}, but this machine has {gpus}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run_under_torchrun(main: Callable[..., int], args: Tuple, device: str, timeout: float) -> int:
    local_rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _join(device, "env://", rank, world, local_rank, processes, timeout)
    code = main(*args)
    dist.destroy_process_group()
    return code


def _worker(local_rank: int, main: Callable[..., int], args: Tuple, job: Tuple, errors) -> None:
    """Body of a spawned process: reports its error, if any, and exits with that error's code."""
    device, processes, machines, machine_rank, dist_url, timeout = job
    rank = machine_rank * processes + local_rank
    faulthandler.register(signal.SIGUSR2)  # prints the stacks; see `_end`
    with stop.listening():
        try:
            _join(device, dist_url, rank, machines * processes, local_rank, processes, timeout)
            code = main(*args)
            dist.destroy_process_group()
        except Exception as error:
            code = getattr(error, "exit_code", 1)
            # Bounded, so that the pipe holds the reports of several processes.
            details = f"rank {rank}:\n{traceback.format_exc()}"[-20_000:]
            errors.put((local_rank, one_line(error)[:10_000], code, details))
        _exit_at_once(code)


def leave(code: int) -> NoReturn:
    """End the command with this exit code. `_exit_at_once` if it is one process of several."""
    if under_torchrun():
        _exit_at_once(code)
    raise SystemExit(code)


def _exit_at_once(code: int) -> NoReturn:
    """Not as sys.exit does, which would wait for threads and collectives that other ranks never
    answer, take a signal after the last step for a failure, and sometimes end in SIGABRT, because
    gloo's threads outlive the interpreter (torch 2.11: in 1 of 80 processes)."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(
    device: str,
    url: str,
    rank: int,
    world: int,
    local_rank: int,
    processes: int,
    timeout: float,
) -> None:
    """Make this process a member of the job."""
    backend = compat.backend_for(device)
    if backend == "nccl":
        torch.cuda.set_device(local_rank)
    else:
        # Processes that each use all cores slow each other down many times over.
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    patience = max(timeout, TIMEOUT)  # until all have been started
    try:
        dist.init_process_group(
            backend,
            init_method=url,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=patience),
        )
    except dist.DistError as error:
        raise UserError(
            f"rank {rank}: not all {world} processes met at {url} within {patience:g} s "
            f"({one_line(error)[:200]}); see what the other machines said"
        ) from error
    compat.create_local_process_group(processes)
    comm.synchronize()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
