"""Kill a training at any moment, start it again, and compare with one that was left alone.

`test_survival.py` does it a few times, `tools/soak.py` many.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Dict, Iterator, List

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase

from fgd import cli, job
from fgd.engine.history import CLOCKS
from fgd.engine.run_folder import read_checkpoint
from fgd.engine.trainer import FGDTrainer
from tests.fgd.training import assert_equal, distilled, training_cfg

# Its processes are forked from one that has only imported: new ones, without the wait.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
MOMENTS = ("save", "step", "time")


class Record(HookBase):
    """Appends a line per step to a file: state before it, images, and losses, all to the bit."""

    def __init__(self, path: str):
        self.file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def before_step(self):
        self.state = digest(self.trainer.model.state_dict(), self.trainer.optimizer.state_dict())

    def after_step(self):
        latest = self.trainer.storage.latest()
        losses = {k: v.hex() for k, (v, _) in latest.items() if "loss" in k}
        images = self.trainer.stream.last_images
        line = {"state": self.state, "images": images, "losses": losses}
        os.write(self.file, json.dumps([self.trainer.iter, line]).encode() + b"\n")


def digest(*values) -> str:
    """SHA-256 of nested dicts and lists of tensors, numbers and strings."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in value:
                sha.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(values)
    return sha.hexdigest()


class RecordedTrainer(FGDTrainer):
    def build_hooks(self):
        path = os.path.join(os.path.dirname(self.cfg.OUTPUT_DIR), "record.jsonl")
        return [Record(path), *super().build_hooks()]


def train(config_file: str) -> None:
    """The command, in a process of its own."""
    torch.set_num_threads(1)
    console = os.open(f"{config_file}.txt", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(console, descriptor)
    job.FGDTrainer = RecordedTrainer
    os._exit(cli.main(["--config-file", config_file, "--resume"]))


def write_config(folder: Path, workers: int, iterations: int) -> Path:
    """A distilled RetinaNet with checkpoints every 3 iterations, of which the last 3 are kept."""
    torch.manual_seed(0)  # of the teacher
    opts = ("SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", 3)
    opts += ("SOLVER.KEEP_CHECKPOINTS", 3, "DATALOADER.NUM_WORKERS", workers)
    opts += ("DOCTOR.BRIEF_IMAGES", 1, "DOCTOR.MIN_AP50", 0.0)
    cfg: CfgNode = distilled(training_cfg(folder, opts=(*opts, "TEST.EVAL_PERIOD", 6)), folder)
    cfg.MODEL.DISTILLER.FACTOR = 5e-4  # the teacher's weights are random, and its features large
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # DATASETS.JSON names them
    path = folder / "config.yaml"
    path.write_text(cfg.dump())
    return path


def left_alone(config_file: Path) -> float:
    """Train without a kill into ``whole/``; returns the seconds."""
    started = time.perf_counter()
    process = CONTEXT.Process(target=train, args=(str(config_file),))
    process.start()
    process.join()
    assert process.exitcode == 0, console(config_file)
    folder = config_file.parent
    (folder / "whole").mkdir()
    for name in ("out", "record.jsonl"):
        shutil.move(folder / name, folder / "whole" / name)
    return time.perf_counter() - started


def console(config_file: Path) -> str:
    return Path(f"{config_file}.txt").read_text()[-3000:]


def killed(
    config_file: Path, moments: Iterator[str], seconds: float, chance: random.Random
) -> list:
    """Train with the same command until it ends by itself, killed at each of ``moments``.

    Args:
        moments: "save": while a checkpoint is written; "step": after some steps; "time": at a
            random time of ``seconds``, what a whole run takes. Consumed as needed.
    Returns:
        One dict per kill: its moment, whether it left a half-written file (under its temporary
        name), and how many checkpoints were whole afterwards. Each of them must be.
    """
    out = config_file.parent / "out"
    kills: List[dict] = []
    for moment in moments:
        process = CONTEXT.Process(target=train, args=(str(config_file),))
        process.start()
        _wait(process, moment, config_file.parent, seconds, chance)
        workers = children(process.pid)
        process.kill()
        process.join()
        assert ended(workers), "workers outlive a killed training"
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -9, console(config_file)
        names = os.listdir(out) if out.exists() else []
        checkpoints = [name for name in names if name.endswith(".pth") and name[0] != "."]
        for name in checkpoints:
            read_checkpoint(str(out / name))
        half = any(name.startswith(".tmp") for name in names)
        kills.append({"moment": moment, "half": half, "whole": len(checkpoints)})
    process = CONTEXT.Process(target=train, args=(str(config_file),))
    process.start()
    process.join()
    assert process.exitcode == 0, console(config_file)
    return kills


def children(parent: int) -> List[str]:
    """Folders in /proc of the processes that ``parent`` has started and that still run."""
    found = []
    for folder in os.listdir("/proc"):
        try:
            text = Path("/proc", folder, "stat").read_text() if folder.isdigit() else ""
        except OSError:  # ended meanwhile
            continue
        state, number = (text.rpartition(")")[2].split() + ["", ""])[:2]
        if number == str(parent) and state != "Z":
            found.append(folder)
    return found


def ended(processes: List[str], seconds: float = 10) -> bool:
    """Whether they end within that time; one that nobody has waited for yet has ended too."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = []
        for folder in processes:
            try:
                states.append(
                    Path("/proc", folder, "stat").read_text().rpartition(")")[2].split()[0]
                )
            except OSError:
                continue
        if set(states) <= {"Z", "X"}:
            return True
        time.sleep(0.05)
    return False


def _wait(process, moment: str, folder: Path, seconds: float, chance: random.Random) -> None:
    """Return when the moment has come, or the process has ended."""
    if moment == "time":
        process.join(chance.uniform(0, seconds))
        return
    ready = _saving(folder / "out", chance) if moment == "save" else _stepped(folder, chance)
    while process.is_alive() and not next(ready):
        time.sleep(2e-4)


def _saving(out: Path, chance: random.Random) -> Iterator[bool]:
    """True while a file is being written for the first or second time since the first call."""
    seen, count = set(), chance.choice([1, 2])
    while len(seen) < count:
        files = os.scandir(out) if out.exists() else ()
        # What a listing says: a file may be gone by the time that it is asked for more.
        seen.update(x.inode() for x in files if x.name.startswith(".tmp") and "model" in x.name)
        yield len(seen) >= count
    yield True


def _stepped(folder: Path, chance: random.Random) -> Iterator[bool]:
    """True some steps, and a part of one, after the first call."""
    path = folder / "record.jsonl"
    target = _lines(path) + chance.randint(1, 6)
    while _lines(path) < target:
        yield False
    end = time.monotonic() + chance.uniform(0, 0.2)
    while time.monotonic() < end:
        yield False
    yield True


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_equal(folder: Path) -> Dict[str, int]:
    """Compare ``folder``/out with ``folder``/whole/out in all that was saved and recorded.

    Returns:
        How much was compared.
    Raises:
        AssertionError: the first difference.
    """
    whole = folder / "whole"
    first, second = (
        torch.load(x / "out" / "model_final.pth", weights_only=True) for x in (whole, folder)
    )
    assert_equal(first, second)  # optimizer, schedule, random numbers, config: nothing left out
    assert metrics(whole / "out") == metrics(folder / "out")
    names = {x: sorted(p.name for p in (x / "out").glob("*.pth")) for x in (whole, folder)}
    assert names[whole] == names[folder]
    assert not list((folder / "out").glob(".tmp*"))
    results = [json.loads((x / "out" / "results.json").read_text()) for x in (whole, folder)]
    assert str(results[0]) == str(results[1])  # as text, because NaN is not NaN
    expected = dict(map(json.loads, (whole / "record.jsonl").read_text().splitlines()))
    lines = (folder / "record.jsonl").read_bytes().splitlines(keepends=True)
    steps = [json.loads(line) for line in lines if line.endswith(b"\n")]
    for iteration, step in steps:
        assert step == expected[iteration], f"iteration {iteration}"
    assert {iteration for iteration, _ in steps} == expected.keys() == set(range(len(expected)))
    return {"steps": len(steps), "again": len(steps) - len(expected), "of": len(expected)}


def metrics(folder: Path) -> List[str]:
    """The lines of metrics.json, sorted, without what a clock says; each is complete."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return sorted(str({k: v for k, v in line.items() if k not in CLOCKS}) for line in lines)
