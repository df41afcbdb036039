"""SIGKILL in the middle of anything, then the same command: the same end, bit by bit."""

import json
import random
import shutil

import pytest
import torch

from . import killing

SEED = 5  # the first kill comes after five or more steps, so past a checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder per number of workers, with a run that was left alone and one that was killed."""
    folders = {}
    for workers, moments in ((0, ("step", "save")), (2, ("step",))):
        folder = tmp_path_factory.mktemp(f"workers{workers}")
        config = killing.write_config(folder, workers, iterations=12)
        seconds = killing.left_alone(config)
        kills = killing.killed(config, iter(moments), seconds, random.Random(SEED))
        folders[workers] = folder, kills
    return folders


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_is_bit_equal_to_left_alone(workers, runs):
    folder, kills = runs[workers]
    assert [kill["moment"] for kill in kills] == ["step", "save"][: len(kills)] and kills
    assert killing.check_equal(folder)["of"] == 12
    log = (folder / "out" / "log.txt").read_text()
    assert log.count("Starting training from iteration 0") == 1
    assert log.count("Resuming from") == len(kills)


def test_workers_do_not_matter(runs):
    texts = []
    for folder, _ in runs.values():
        texts.append((folder / "whole" / "record.jsonl").read_text().replace(str(folder), ""))
    assert texts[0] == texts[1]


FAULTS = ("weights", "optimizer", "images", "losses", "metrics", "step")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_any_difference(fault, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[0][0], folder)
    if fault in ("weights", "optimizer"):
        path = folder / "out" / "model_final.pth"
        data = torch.load(path, weights_only=True)
        states = data["trainer"]["optimizer"]["state"]
        tensors = data["model"] if fault == "weights" else states[0]
        name, tensor = next((k, v) for k, v in tensors.items() if v.is_floating_point())
        tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0))
        torch.save(data, path)
    elif fault == "metrics":
        path = folder / "out" / "metrics.json"
        path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    else:
        path = folder / "record.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if fault == "images":
            lines[-1][1]["images"].reverse()
        elif fault == "losses":
            lines[-1][1]["losses"]["loss_cls"] = "0x1p-3"
        else:
            lines = [line for line in lines if line[0] != 4]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(AssertionError):
        killing.check_equal(folder)
