"""Runs the runs: side by side, one GPU each, in processes of their own that can be stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch
from detectron2.config import CfgNode

from ..distillation.teacher import teacher_config
from ..engine.results import RESULTS
from ..errors import UserError
from ..processes.with_parent import with_parent
from . import budget
from .advice import ways_out
from .arms import TEACHER, TIMED
from .files import (
    CONSOLE,
    MINUTES,
    disbelieved,
    is_finished,
    read_minutes,
    read_result,
    write_json,
    write_measured,
    write_text,
)
from .progress import Progress
from .run import Run

_POLL = 0.1  # seconds
_STOPPED = (75, 130, -signal.SIGTERM, -signal.SIGINT)  # by a signal; nothing is wrong


class Failure(NamedTuple):
    """A run without results: why, its exit code, and whether only a signal stopped it."""

    run: Run
    reason: str
    exit_code: int
    stopped: bool = False

    def __str__(self) -> str:
        log = self.run.folder / CONSOLE
        where = f" (log: {log})" if log.exists() else ""  # it was started
        return f"{'stopped' if self.stopped else 'FAILED'}: {self.run}: {self.reason}{where}"


class Job(NamedTuple):
    run: Run
    process: subprocess.Popen
    gpu: str  # "" = none
    started: float
    training: bool  # not the evaluation of what it has chosen


def gpus(device: str, environ: Mapping[str, str] = os.environ) -> List[str]:
    """GPUs that runs may be spread over, as CUDA_VISIBLE_DEVICES names them.

    [] on a CPU, and where the config itself names the GPU ("cuda:1").
    """
    if device != "cuda":
        return []
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


class Runner:
    """Trains runs, those first that others need; one that fails does not stop the others.

    Args:
        runs: all of the study, in the order in which they are started.
        jobs: how many at a time. gpus: names to spread them over; [] = no GPU is assigned.
        threads: OMP_NUM_THREADS of each. label_seconds: of `budget.equal_time`.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        cfg: CfgNode,
        output: Path,
        jobs: int = 1,
        threads: int = 1,
        gpus: Sequence[str] = (),
        label_seconds: Optional[float] = None,
    ):
        self.runs, self.cfg, self.output = runs, cfg, output
        self.jobs, self.threads, self.gpus = jobs, threads, list(gpus)
        self.label_seconds = label_seconds
        self.waiting: List[Run] = []
        self.running: List[Job] = []
        self.failures: List[Failure] = []
        self.progress = Progress()

    def run_all(self) -> List[Failure]:
        """Train what is not finished; returns the runs without results, empty if all went well.

        On SIGINT, SIGTERM or SIGHUP the running ones are told to save and stop, and
        KeyboardInterrupt is raised once they have. After SIGKILL the kernel kills them.
        """
        for run in self.runs:
            if is_finished(run):
                _announce(run)
                continue
            self.waiting.append(run)
            if reason := disbelieved(run):
                print(f"{reason}; it is evaluated again", flush=True)
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        numbers = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]
        previous = {x: signal.signal(x, signal.default_int_handler) for x in numbers}
        try:
            while self.waiting or self.running:
                self._start_ready()
                self._collect()
                now = time.perf_counter()
                self.progress.show([(job.run, now - job.started) for job in self.running])
        finally:
            self._stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.failures

    def _start_ready(self) -> None:
        left = [*self.waiting, *(job.run for job in self.running)]
        busy = {name for run in left for name in (run.arm, str(run))}
        for run in list(self.waiting):
            if len(self.running) == self.jobs:
                return
            if busy & set(run.needs):
                continue
            self.waiting.remove(run)
            try:
                self.running.append(self._start(run))
            except (UserError, OSError) as error:
                self._fail(Failure(run, str(error), UserError.exit_code))

    def _start(self, run: Run) -> Job:
        lost = [str(f.run) for f in self.failures if str(f.run) in run.needs]
        if TEACHER in lost:
            raise UserError("not started, there is no teacher")
        if lost:
            raise UserError(f"not started, {lost[0]} has no results")
        self.progress.clear()  # steps may be timed now, which is said
        command, training = self.command(run), not _is_to_be_chosen(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        write_measured(run)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        gpu = self._free_gpu()
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with open(run.folder / CONSOLE, "a") as console:
            process = subprocess.Popen(
                with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C goes to the study alone, which then stops each run once.
                start_new_session=True,
            )
        return Job(run, process, gpu, time.perf_counter(), training)

    def _free_gpu(self) -> str:
        """The GPU with the fewest runs on it; "" without GPUs."""
        used = [job.gpu for job in self.running]
        return min(self.gpus, key=used.count, default="")

    def command(self, run: Run) -> List[str]:
        """The command of a run, as a shell would take it: its training, then the evaluation of
        the checkpoint that a validation set chose, if one is to choose.

        Raises:
            UserError: the time of an arm cannot be measured; the teacher has no config; or the
                training has chosen nothing.
        """
        options = _options(run)
        if run.arm in TIMED:
            known = self._words(), self.cfg, self.output, self.threads, self.label_seconds
            options.update(budget.schedule(budget.equal_time(run.arm, *known), self.cfg))
        words = [sys.executable, "-c", "from fgd.cli import main; raise SystemExit(main())"]
        if _is_to_be_chosen(run):
            if not os.path.exists(run.weights):
                raise UserError(f"there is no {run.weights}: no evaluation gave a figure")
            options.update({"OUTPUT_DIR": str(run.reported), "MODEL.WEIGHTS": run.weights})
            words.append("--eval-only")
        elif run.eval_only:
            write_text(Path(run.config_file), _evaluated_config(self.cfg))
            words.append("--eval-only")
        else:
            words += ["--resume", *(["--balance"] if run.balance else [])]
            words += ["--starts-as", str(run.before[-1].folder / RESULTS)] if run.before else []
        words += ["--config-file", run.config_file]
        return words + _pairs(options)

    def _words(self) -> Dict[str, List[str]]:
        """Arm → config file and options, for those that others have the time of."""
        return {
            run.arm: [run.config_file, *_pairs(_options(run))]
            for run in reversed(self.runs)  # of several seeds the first
            if run.arm not in (TEACHER, *TIMED)
        }

    def _collect(self) -> None:
        """Wait a moment, then take what has ended."""
        time.sleep(_POLL)
        for job in list(self.running):
            code = job.process.poll()
            if code is None:
                continue
            self.progress.clear()
            self.running.remove(job)
            _add_minutes(job)
            if code == 0 and is_finished(job.run):
                _announce(job.run)
                continue
            if code == 0 and job.training and _is_to_be_chosen(job.run):
                self.waiting.insert(0, job.run)
                continue
            log = (job.run.folder / CONSOLE).read_text(errors="replace").strip().splitlines()
            reason = f"exit code {code}: {log[-1] if log else 'no output'}"
            reason += ways_out(reason, job.run.folder)
            if code == 0 and disbelieved(job.run):
                reason = disbelieved(job.run)
            # A negative code is the number of the signal that killed it; a shell adds it to 128.
            number = code if code >= 0 else 128 - code
            self._fail(Failure(job.run, reason, number, code in _STOPPED))

    def _fail(self, failure: Failure) -> None:
        self.progress.clear()
        self.failures.append(failure)
        print(failure, file=sys.stderr, flush=True)

    def _stop(self) -> None:
        """SIGTERM to what still runs, and wait until it has saved; nothing if all have ended."""
        self.progress.clear()
        for job in self.running:
            job.process.send_signal(signal.SIGTERM)
        for job in self.running:
            job.process.wait()
            _add_minutes(job)
            print(f"stopped: {job.run} (log: {job.run.folder / CONSOLE})", file=sys.stderr)
        self.running = []


def _options(run: Run) -> Dict[str, str]:
    return {"SEED": str(run.seed), "OUTPUT_DIR": str(run.folder), **run.opts}


def _pairs(options: Dict[str, str]) -> List[str]:
    return [word for pair in options.items() for word in pair]


def _is_to_be_chosen(run: Run) -> bool:
    """Whether its training has ended, and the best of it is what is reported."""
    return run.select and is_finished(run.trained)


def _add_minutes(job: Job) -> None:
    spent = (time.perf_counter() - job.started) / 60
    try:
        write_json(job.run.folder / MINUTES, (read_minutes(job.run) or 0.0) + spent)
    except UserError as error:  # the runs go on without this time
        print(f"{job.run}: its time is not recorded: {error}", file=sys.stderr, flush=True)


def _announce(run: Run) -> None:
    result = read_result(run)
    found = [f"{kind} AP {_one_place(result[kind]['AP'])}" for kind in kinds(result)]
    print(f"{run}: {', '.join(found) or 'nothing evaluated'} in {run.reported}", flush=True)


def _one_place(value) -> str:
    return "none" if value is None else f"{value:.1f}"


def kinds(result: Dict) -> List[str]:
    """What a results.json has: "bbox" for boxes, "segm" for masks."""
    return [kind for kind in ("bbox", "segm") if kind in result]


def _evaluated_config(cfg: CfgNode) -> str:
    """The teacher's own config on the study's data."""
    teacher = teacher_config(cfg)
    teacher.DATASETS = cfg.DATASETS.clone()
    return teacher.dump()
