import time

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from fgd.errors import UserError
from fgd.launch import WorkerError, check_processes, launch, one_line

from . import ranks
from .training import write_dataset


def test_one_process_is_this_one():
    assert launch(lambda x: x + 1, (4,), device="cpu") == 5


def test_two_cpu_processes_train_one_model_and_stop_together(tmp_path):
    """Equal weights on both ranks; a NaN on rank 1 alone makes neither of them step."""
    write_dataset(tmp_path / "data")
    assert launch(ranks.train, (str(tmp_path),), device="cpu", processes=2) == 0
    a, b = (torch.load(tmp_path / f"rank{i}.pth", weights_only=True) for i in range(2))
    assert [(x["local_rank"], x["local_size"]) for x in (a, b)] == [(0, 2), (1, 2)]
    for result in (a, b):
        assert result["iteration"] == 2
        assert "iteration 2: a loss became infinite or NaN on rank 1 (" in result["message"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    saved = torch.load(tmp_path / "out" / "model_0000001.pth", weights_only=True)
    assert len(saved["rng"]) == len(saved["trainer"]["loss_normalizers"]) == 2
    assert not torch.equal(saved["rng"][0]["torch"], saved["rng"][1]["torch"])
    moved = 0
    for name, value in saved["model"].items():
        trained = a["model"].get(f"module.{name}")
        moved += not torch.equal(value, a["initial"][name])
        assert trained is None or torch.equal(value, trained)
    assert moved > 10


def test_two_processes_distil_as_one(tmp_path):
    """DDP's mean of the gradients of two halves of a batch is the whole batch's gradient."""
    assert launch(ranks.distil, (str(tmp_path),), device="cpu", processes=2) == 0
    model = ranks.Distilled()
    model(*ranks.distillation_batch()).backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"gradients{rank}.pth", weights_only=True)
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_killed_process_ends_the_job(capfd):
    start = time.monotonic()
    with pytest.raises(WorkerError, match="process 1 terminated with signal SIGKILL") as error:
        launch(ranks.die_on_rank_1, device="cpu", processes=2)
    assert error.value.exit_code == 1 and time.monotonic() - start < 60


def test_torchrun_environment_is_joined(monkeypatch):
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)

    def main():
        assert dist.get_backend() == "gloo" and comm.get_local_rank() == 0
        return 7

    assert launch(main, device="cpu", processes=8) == 7
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cpu", 0, 1, 0, "auto"), "--num-gpus 0"),
        (("cpu", 1, 2, 2, "tcp://h:1"), "--machine-rank 2"),
        (("cpu", 1, 2, 1, "auto"), "--dist-url tcp://HOST:PORT"),
        (("cuda", 99, 1, 0, "auto"), "--num-gpus 99, but this machine has"),
    ],
)
def test_impossible_counts_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        check_processes(*arguments)


def test_one_line_of_an_error():
    assert one_line(ValueError("a\nb")) == "b"
    assert one_line(EOFError()) == "EOFError"
