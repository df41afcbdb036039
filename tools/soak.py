"""Kill, damage and fill up training runs many times; any violation is an exit code other than 0.

    python -m tools.soak --output output/soak

`make soak` runs it. The suite has a short form of each part. Writes OUTPUT/soak.json.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Callable, Dict, List, Sequence

from tabulate import tabulate
from torch import nn

from fgd.engine.run_folder import newest_checkpoint, read_checkpoint
from fgd.errors import UserError
from fgd.files import atomic_write, remove_stale_temporaries
from tests.fgd.engine import killing
from tests.fgd.engine.test_checkpoint import full_disk, make_checkpointer
from tools.soak_memory import soak as soak_memory


def kill_trainings(folder: Path, workers: int, kills: int, seed: int) -> Dict[str, int]:
    """Kill runs at random moments until there are ``kills``; each run ends as one left alone."""
    chance = random.Random(f"{seed} {workers}")
    folder.mkdir(parents=True)
    config = killing.write_config(folder, workers, iterations=24)
    seconds = killing.left_alone(config)
    figures = {"kills": 0, "in a save": 0, "runs": 0, "steps": 0, "steps again": 0}
    while figures["kills"] < kills:
        moments = (chance.choice(killing.MOMENTS) for _ in range(kills - figures["kills"]))
        done = killing.killed(config, moments, seconds, chance)
        compared = killing.check_equal(folder)
        figures["kills"] += len(done)
        figures["in a save"] += sum(kill["half"] for kill in done)
        figures["runs"] += 1
        figures["steps"] += compared["steps"]
        figures["steps again"] += compared["again"]
        shutil.rmtree(folder / "out")
        (folder / "record.jsonl").unlink()
    return figures


def damage(folder: Path, flips: int, seed: int) -> Dict[str, int]:
    """Flip a bit anywhere in the newest checkpoint: found, said, and the one before it taken."""
    source = folder / "whole" / "out"
    copy = folder / "damaged"
    shutil.copytree(source, copy)
    newest = copy / (copy / "last_checkpoint").read_text()
    good, chance = newest.read_bytes(), random.Random(seed)
    said = Said()
    for place in chance.sample(range(len(good)), flips):
        data = bytearray(good)
        data[place] ^= 1 << chance.randrange(8)
        newest.write_bytes(data)
        said.lines.clear()
        path, _ = newest_checkpoint(str(copy))
        assert os.path.basename(path) == "model_0000023.pth", (place, path)
        assert any(newest.name in line for line in said.lines), place
        assert any("the newest checkpoint that is whole" in line for line in said.lines), place
    said.stop()
    shutil.rmtree(copy)
    return {"bytes of the file": len(good), "flips": flips, "found, said, passed over": flips}


class Said(logging.Handler):
    """Collects what the project's loggers say."""

    def __init__(self):
        super().__init__()
        self.lines: List[str] = []
        self.loggers = [logging.getLogger("fgd")]
        self.loggers[0].addHandler(self)
        self.loggers[0].propagate = False

    def emit(self, record):
        self.lines.append(record.getMessage())

    def stop(self):
        self.loggers[0].removeHandler(self)


def save_forever(folder: str, started, atomic: bool) -> None:
    """Write the same checkpoint again and again; without ``atomic`` as plain writing would."""
    logging.disable(logging.WARNING)
    saver = make_checkpointer(folder, nn.Linear(1500, 1500))
    saver.save("model_final", iteration=0)
    content = (Path(folder) / "model_final.pth").read_bytes()
    started.set()
    while True:
        if atomic:
            saver.save("model_final", iteration=1)
        else:
            (Path(folder) / "model_final.pth").write_bytes(content)


def kill_writers(folder: Path, kills: int, seed: int, *, atomic: bool) -> Dict[str, int]:
    """SIGKILL a process that does nothing but save; how many files are whole afterwards."""
    chance = random.Random(seed)
    figures = {"kills": 0, "whole": 0, "half under a temporary name": 0}
    for _ in range(kills):
        folder.mkdir()
        started = killing.CONTEXT.Event()
        process = killing.CONTEXT.Process(target=save_forever, args=(str(folder), started, atomic))
        process.start()
        assert started.wait(120)
        time.sleep(chance.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        figures["kills"] += 1
        figures["half under a temporary name"] += len(list(folder.glob(".tmp*")))
        remove_stale_temporaries(str(folder))
        try:
            read_checkpoint(str(folder / "model_final.pth"))
            figures["whole"] += 1
        except UserError:
            pass
        shutil.rmtree(folder)
    assert not atomic or figures["whole"] == kills
    return figures


def fill_disk(folder: Path, times: int, seed: int) -> Dict[str, int]:
    """Saves that stop at any length: the old file and the pointer stay, nothing else does."""
    chance = random.Random(seed)
    folder.mkdir()
    saver = make_checkpointer(folder, nn.Linear(300, 300))
    saver.save("model_final", iteration=0)
    good = (folder / "model_final.pth").read_bytes()
    for i in range(times):
        name = chance.choice(["model_final", f"model_{i:07d}"])
        with full_disk(chance.randrange(len(good))):
            try:
                saver.save(name, iteration=i)
            except UserError as error:
                assert "MiB are free" in str(error)
            else:
                raise AssertionError("a file that does not fit was saved")
        assert sorted(os.listdir(folder)) == ["last_checkpoint", "model_final.pth"]
        assert (folder / "model_final.pth").read_bytes() == good
        assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    return {"failed saves": times, "harmless": times}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/soak"))
    parser.add_argument("--kills", type=int, default=20, help="per number of workers")
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    folder, seed = args.output.resolve(), args.seed
    parts: Dict[str, Callable[[], dict]] = {
        **{
            f"training, {workers} workers, killed": lambda workers=workers: kill_trainings(
                folder / f"workers{workers}", workers, args.kills, seed
            )
            for workers in (0, 2)
        },
        "bits flipped in a checkpoint": lambda: damage(folder / "workers0", args.flips, seed),
        "writer killed": lambda: kill_writers(folder / "w", args.kills, seed, atomic=True),
        "plain writer killed, to compare": lambda: kill_writers(
            folder / "w", args.kills, seed, atomic=False
        ),
        "disk full": lambda: fill_disk(folder / "full", 50, seed),
        "memory of a long training": lambda: soak_memory(folder / "memory"),
    }
    rows = []
    for name, part in parts.items():
        started = time.perf_counter()
        try:
            row = {"part": name, **part()}
        except Exception as error:  # the other parts are still worth running
            traceback.print_exc()
            row = {"part": name, "VIOLATION": f"{type(error).__name__} {error}"}
        rows.append({**row, "minutes": round((time.perf_counter() - started) / 60, 1)})
        print(rows[-1], flush=True)
    text = json.dumps({"seed": seed, "parts": rows}, indent=1)
    atomic_write(str(args.output / "soak.json"), lambda file: file.write(text.encode()))
    shown = [
        [row["part"], ", ".join(f"{k} {v}" for k, v in row.items() if k != "part")] for row in rows
    ]
    print(tabulate(shown, ["part", "figures"], "github"))
    return int(any("VIOLATION" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
