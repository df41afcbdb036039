"""What the processes of test_launch.py run; new processes import it by name."""

import os
import signal
import time
from pathlib import Path

import torch
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

from fgd.config import load_config
from fgd.data.datasets import register_from_config
from fgd.data.stream import build_train_stream
from fgd.engine.trainer import FGDTrainer
from fgd.errors import DivergedError, StoppedError, UserError
from fgd.methods.batch import Level
from fgd.methods.fgd.method import FGD
from fgd.methods.fgd.terms import Weights
from fgd.methods.method import over_levels
from fgd.processes import stop
from fgd.processes.together import check_alike, on_every_process, on_main_process
from tests.fgd.methods.batches import make_batch


class Poison(HookBase):
    """Makes the loss of the third iteration NaN, on rank 1 only."""

    def before_step(self):
        if self.trainer.iter == 2 and comm.get_rank() == 1:
            module = self.trainer.model.module
            forward = module.forward
            module.forward = lambda batch: {k: v * torch.nan for k, v in forward(batch).items()}


class Signal(HookBase):
    """Asks rank 1 alone to stop, in the first iteration."""

    def before_step(self):
        if comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def stopped_after_one_step(cfg) -> tuple[str, list[str]]:
    """The message, and the checkpoints that are there when this rank goes on."""
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([Signal()])
    with stop.listening():
        try:
            trainer.train()
        except StoppedError as error:
            return str(error), sorted(os.listdir(cfg.OUTPUT_DIR))
    return "not stopped", []


def train(config_file: str) -> int:
    """A step and a stop, another step, one that diverges; leaves rank{r}.pth."""
    cfg = register_from_config(load_config(config_file))
    stopped, files = stopped_after_one_step(cfg)
    with stop.listening():
        return diverge(cfg, stopped, files)


def diverge(cfg, stopped: str, files: list[str]) -> int:
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.register_hooks([Poison()])
    initial = {k: v.clone() for k, v in trainer.model.module.state_dict().items()}
    try:
        trainer.train()
        message = "no error"
    except DivergedError as error:
        message = str(error)
    result = {
        "stopped": stopped,
        "files": files,
        "images": list(trainer.stream.last_images),
        "model": dict(trainer.model.named_parameters()),
        "initial": initial,
        "message": message,
        "iteration": trainer.iter,
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        "threads": torch.get_num_threads(),
    }
    torch.save(result, Path(cfg.OUTPUT_DIR).parent / f"rank{comm.get_rank()}.pth")
    return 0


def average(config_file: str) -> int:
    """Two steps, each with an evaluation that the main process alone knows; leaves average{r}.pth.

    The first evaluation is the best.
    """
    cfg = register_from_config(load_config(config_file))
    figures = iter((1.0, 0.5))

    def test(cls, cfg, model, evaluators=None):
        return {"bbox": {"AP": next(figures)}} if comm.is_main_process() else {}

    FGDTrainer.test = classmethod(test)
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    torch.save(
        trainer.average.state_dict(),
        Path(cfg.OUTPUT_DIR).parent / f"average{comm.get_rank()}.pth",
    )
    return 0


def die_on_rank_1() -> int:
    """Rank 1 is killed, as by the kernel when memory is short, while rank 0 waits for it."""
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()
    return 0


def hang_on_rank_1() -> int:
    """Rank 1 waits for data that never come, while rank 0 waits for rank 1."""
    if comm.get_rank() == 1:
        never_ready()
    comm.synchronize()
    return 0


def never_ready():
    time.sleep(600)


def hang_in_a_worker_of_rank_1(config_file: str) -> int:
    """An image of rank 1 is never read, while rank 0 waits for rank 1."""
    cfg = register_from_config(load_config(config_file, ["DATALOADER.NUM_WORKERS", 1]))
    stream = build_train_stream(cfg)
    if comm.get_rank() == 1:
        stream.mapper = lambda record: never_ready()
    next(iter(stream))
    comm.synchronize()
    return 0


class Distilled(torch.nn.Module):
    """A convolution under FGD: what is trained when a detector is distilled, in small."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = torch.nn.Conv2d(3, 4, 3, padding=1)
        levels = [Level("p3", 4, 6)]
        self.method = FGD(levels, Weights(1.0, 0.5, 0.1, 0.1), 0.5, "padded").double()
        for parameter in self.method.parameters():  # away from blocks that are the identity
            torch.nn.init.normal_(parameter, std=0.3)
        self.double()

    def forward(self, images, teacher, boxes):
        maps = {"p3": self.student(images)}, {"p3": teacher}
        return sum(over_levels(self.method(make_batch(*maps, boxes, (32, 40)))).values())


def distillation_batch(empty=()):
    """Images, the teacher's maps, and boxes; none in the images of these numbers."""
    generator = torch.Generator().manual_seed(1)
    images, teacher = (
        torch.randn(4, channels, 8, 10, dtype=torch.float64, generator=generator)
        for channels in (3, 6)
    )
    corners = torch.rand(4, 3, 2, generator=generator) * 20
    boxes = list(torch.cat([corners, corners + 9], dim=2))
    return images, teacher, [b[:0] if i in empty else b for i, b in enumerate(boxes)]


# Images without boxes: none, all of rank 1's, all.
EMPTY = ((), (2, 3), (0, 1, 2, 3))


def ten_steps(model, share=slice(None)):
    """Trains with momentum on one batch, in float32."""
    model.float()
    images, teacher, boxes = (x[share] for x in distillation_batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        model(images.float(), teacher.float(), boxes).backward()
        optimizer.step()


def distil(folder: str) -> int:
    """`Distilled` under DDP, each rank with its share; leaves distilled{r}.pth."""
    model = torch.nn.parallel.DistributedDataParallel(Distilled())
    share = slice(2 * comm.get_rank(), 2 * comm.get_rank() + 2)
    gradients = []
    for empty in EMPTY:
        model.zero_grad()
        model(*(x[share] for x in distillation_batch(empty))).backward()
        gradients.append({name: x.grad.clone() for name, x in model.module.named_parameters()})
    trained = Distilled().float()
    ten_steps(torch.nn.parallel.DistributedDataParallel(trained), share)
    result = {"gradients": gradients, "weights": trained.state_dict()}
    torch.save(result, Path(folder) / f"distilled{comm.get_rank()}.pth")
    return 0


def fail_apart(folder: str) -> int:
    """Leaves {rank}.txt: how each of four stages ended in this process."""
    rank = comm.get_rank()

    def without_file():
        if rank == 1:
            raise UserError("rank 1 has no file")
        on_main_process(lambda: on_main_process(lambda: 1))

    stages = (
        lambda: on_every_process(without_file),
        lambda: on_every_process(lambda: on_main_process(lambda: 1) / (1 - rank)),
        lambda: check_alike(lambda: {"LR": rank, "SEED": 3}),
        lambda: on_main_process(lambda: rank),
    )
    lines = []
    for stage in stages:
        try:
            lines.append(str(stage()))
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
    Path(folder, f"{rank}.txt").write_text("\n".join(lines))
    return 0
