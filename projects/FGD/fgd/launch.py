"""Start one process per GPU, several on the CPU, or join those that torchrun started."""

import multiprocessing
import os
import socket
import sys
import traceback
from datetime import timedelta
from typing import Callable, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from . import compat
from .errors import UserError

TIMEOUT = timedelta(minutes=30)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerError(RuntimeError):
    """The first error of any process: its exit code, one-line message, and traceback text."""

    def __init__(self, message: str, exit_code: int, details: str = ""):
        super().__init__(message)
        self.exit_code, self.details = exit_code, details


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
) -> int:
    """Run ``main(*args)`` in every process of the job and return the main one's exit code.

    Under torchrun this process is already one of the job and the counts given here are not used.

    Args:
        main: importable by name, because new processes import it.
        device: MODEL.DEVICE; "cpu" processes talk over gloo, GPU ones over NCCL.
        processes: per machine; one per GPU.
        dist_url: ``tcp://host:port`` of the first machine; "auto" = a free local port.
    Raises:
        UserError: the counts do not fit the machine.
        WorkerError: a process failed; the others of this machine have been stopped.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and all(key in os.environ for key in _TORCHRUN):
        return _run_under_torchrun(main, args, device)
    check_processes(device, processes, machines, machine_rank, dist_url)
    if processes * machines == 1:
        return main(*args)
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    job = (device, processes, machines, machine_rank, dist_url)
    try:
        mp.spawn(_worker, (main, args, job, errors), nprocs=processes)
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        if not errors.empty():
            raise WorkerError(*errors.get()) from None
        raise WorkerError(f"{error}; was the memory exhausted?", 1) from None
    return 0


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


def _run_under_torchrun(main: Callable[..., int], args: Tuple, device: str) -> int:
    local_rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _join(device, "env://", rank, world, local_rank, processes)
    try:
        return main(*args)
    finally:
        dist.destroy_process_group()


def _worker(local_rank: int, main: Callable[..., int], args: Tuple, job: Tuple, errors) -> None:
    """Body of a spawned process: reports its error, if any, and exits with that error's code."""
    device, processes, machines, machine_rank, dist_url = job
    rank = machine_rank * processes + local_rank
    try:
        _join(device, dist_url, rank, machines * processes, local_rank, processes)
        code = main(*args)
        dist.destroy_process_group()
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        # Bounded, because the queue's pipe is read only after a process has ended.
        details = f"rank {rank}:\n{traceback.format_exc()}"[-20_000:]
        errors.put((one_line(error)[:10_000], code, details))
    if code:
        # Not sys.exit: it would wait for threads and collectives that other ranks never answer.
        sys.stdout.flush()
        os._exit(code)


def _join(device: str, url: str, rank: int, world: int, local_rank: int, processes: int) -> None:
    """Make this process a member of the job."""
    backend = compat.backend_for(device)
    if backend == "nccl":
        torch.cuda.set_device(local_rank)
    else:
        # Processes that each use all cores slow each other down many times over.
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=world, timeout=TIMEOUT)
    compat.create_local_process_group(processes)
    comm.synchronize()
