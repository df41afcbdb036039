"""Whole jobs as a user starts them: alone, under torchrun, by Slurm; and signalled."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fgd.cli import build_parser
from tests.fgd.data.test_workers import is_running, wait_until
from tests.fgd.engine.test_trainer import assert_equal, load

from .training import training_cfg

TRAIN_NET = str(Path(__file__).parents[2] / "projects" / "FGD" / "train_net.py")
STOPPED = r"^stopped by SIGTERM at iteration (\d+) of (\d+), all saved in (.*); go on with: (.*)$"


def config_file(folder, opts=()):
    """A yaml beside the data, with names that shells and old locales find difficult."""
    cfg = training_cfg(folder, opts=opts)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    path = folder / "mein Lauf.yaml"
    path.write_text(cfg.dump(allow_unicode=True), encoding="utf-8")
    return path


class Job:
    """A command in the background; its stdout is read on, its stderr kept."""

    def __init__(self, *command, **environment):
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            encoding="utf-8",
        )
        self.lines, self.errors = [], []
        pipes = {self.process.stdout: self.lines, self.process.stderr: self.errors}
        self.threads = [
            threading.Thread(target=kept.extend, args=(pipe,), daemon=True)
            for pipe, kept in pipes.items()
        ]
        for thread in self.threads:
            thread.start()

    def wait_for_training(self):
        started = wait_until(
            lambda: any("Starting training" in x for x in self.lines) or self.process.poll(), 300
        )
        assert started is True, self.errors

    def stop_in_training(self):
        self.wait_for_training()
        self.process.send_signal(signal.SIGTERM)

    def end(self):
        """Exit code and stderr."""
        self.process.wait(timeout=300)
        for thread in self.threads:
            thread.join()
        return self.process.returncode, "".join(self.errors)


def processes_of(path):
    """Ids of all processes whose command line names a file."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            named = os.fsencode(path) in (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if named and is_running(int(entry.name)):
            found.append(int(entry.name))
    return found


def test_the_printed_command_goes_on_to_the_same_end(tmp_path):
    """Spaces and umlauts in all paths, a link for OUTPUT_DIR, no locale, another time zone."""
    folder = tmp_path / "Köln 1"
    folder.mkdir()
    (folder / "größer").mkdir()
    (folder / "out").symlink_to("größer")
    config = config_file(folder, ("SOLVER.MAX_ITER", 20, "SOLVER.STEPS", (15,)))
    whole = ("OUTPUT_DIR", folder / "whole")
    first = Job(sys.executable, TRAIN_NET, "--config-file", config, LC_ALL="C", TZ="Asia/Tokyo")
    first.stop_in_training()
    code, errors = first.end()
    assert code == 75, errors
    done, of, where, command = re.search(STOPPED, errors, re.MULTILINE).groups()
    assert 0 < int(done) < int(of) == 20 and where == str(folder / "out")
    saved = load(folder / "größer" / f"model_{int(done) - 1:07d}.pth")
    assert saved["iteration"] == int(done) - 1
    assert command.count("--resume") == 1
    second = Job("sh", "-c", command, LC_ALL="C", TZ="America/New_York")
    reference = Job(sys.executable, TRAIN_NET, "--config-file", config, *whole)
    for job in (second, reference):
        code, errors = job.end()
        assert code == 0, errors
    a, b = (load(folder / x / "model_final.pth") for x in ("größer", "whole"))
    for key in ("model", "trainer", "rng"):
        assert_equal(a[key], b[key], key)
    lines = (folder / "größer" / "metrics.json").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    assert iterations == [int(done) - 1, 19, 20], "a line for the stop, none twice"


LONG = ("SOLVER.MAX_ITER", 2000, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 5000)


def assert_saved_by_two(folder, done):
    saved = torch.load(folder / f"model_{int(done) - 1:07d}.pth", weights_only=True)
    assert len(saved["rng"]) == 2
    assert (folder / "last_checkpoint").read_text() == f"model_{int(done) - 1:07d}.pth"


def test_torchrun_passes_the_signal_on_and_all_ranks_save_together(tmp_path):
    config = config_file(tmp_path, LONG)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = Job(*torchrun, "--nproc-per-node", 2, TRAIN_NET, "--config-file", config)
    job.stop_in_training()
    code, errors = job.end()
    assert code == 1, "torchrun knows no other code"
    (found,) = re.findall(STOPPED, errors, re.MULTILINE)
    done, _, where, command = found
    assert where == str(tmp_path / "out")
    start = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 {TRAIN_NET}"
    assert command == f"{start} --resume --config-file '{config}'"
    assert_saved_by_two(tmp_path / "out", done)
    assert wait_until(lambda: not processes_of(config))


SLURM = Path(__file__).parents[2] / "tools" / "slurm.sh"
# Two nodes, which are this one twice; srun's code is the highest of its tasks'.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
echo "${pids[@]}" > "$FOLDER/tasks"
status=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > status)) && status=$code; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf '127.0.0.1\\n127.0.0.2\\n'; else echo "$@" >> "$FOLDER/calls"; fi
"""


def cluster(folder, **scripts):
    """Environment of a batch job whose commands are ``scripts``."""
    for name, text in scripts.items():
        path = folder / "bin" / name.replace("_py", ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2"}
    return {**slurm, "SLURM_GPUS_ON_NODE": "1", "FOLDER": str(folder), "PATH": path}


def test_slurm_job_on_two_nodes_stops_together_and_is_requeued(tmp_path):
    """Slurm signals the task of every node, whose launcher passes it on to its processes."""
    config = config_file(tmp_path, LONG)
    environment = cluster(tmp_path, srun=SRUN, scontrol=SCONTROL)
    job = Job("bash", SLURM, "--config-file", config, **environment)
    job.wait_for_training()
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    code, errors = job.end()
    assert code == 75, errors
    found = re.findall(STOPPED, errors, re.MULTILINE)
    assert len(found) == 2 and found[0][:3] == found[1][:3]
    assert {rank for x in found for rank in re.findall(r"--machine-rank (\d)", x[3])} == {"0", "1"}
    assert_saved_by_two(tmp_path / "out", found[0][0])
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"
    assert wait_until(lambda: not processes_of(config))


RECORDER = """#!/bin/bash
printf '%s\\n' "$@" > "$FOLDER/arguments$SLURM_NODEID"
exit $CODE
"""


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (3, False), (1, False)])
def test_slurm_job_is_requeued_only_when_all_is_saved(code, requeued, tmp_path):
    scripts = {"srun": SRUN, "scontrol": SCONTROL, "train_net_py": RECORDER}
    environment = cluster(tmp_path, **scripts) | {"CODE": str(code)}
    done = Job("bash", SLURM, "--config-file", "a b.yaml", "OUTPUT_DIR", "o", **environment).end()
    assert done[0] == code, done
    assert (tmp_path / "calls").exists() == requeued
    for node in range(2):
        words = (tmp_path / f"arguments{node}").read_text().splitlines()
        args = build_parser().parse_args(words)
        assert args.resume and args.config_file == "a b.yaml" and args.opts == ["OUTPUT_DIR", "o"]
        assert (args.num_gpus, args.num_machines, args.machine_rank) == (1, 2, node)
        assert args.dist_url == f"tcp://127.0.0.1:{20000 + os.getpid() % 20000}"


def test_slurm_script_is_valid_bash():
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text()
    for option in ("--requeue", "--signal=TERM@300", "--open-mode=append"):
        assert f"\n#SBATCH {option}\n" in text
