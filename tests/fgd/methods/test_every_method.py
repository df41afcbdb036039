"""What must hold for each distillation method, whatever it computes."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgd.config import student_config
from fgd.engine.trainer import FGDTrainer
from fgd.processes.launch import launch
from tests.conftest import make_training_batch
from tests.fgd.engine.test_trainer import assert_same_end, load, train
from tests.fgd.training import training_cfg

from .every import ALONE, METHODS, build, distil_on_two, gradients, halves, tiny_pair

pytestmark = pytest.mark.parametrize("name", METHODS)


def step(model, batch, iteration=0):
    with EventStorage(iteration):
        return model(copy.deepcopy(batch))


def trainable(cfg, folder):
    """The same pair on files, for 8 steps of the trainer."""
    run = training_cfg(folder)
    run.MODEL = cfg.MODEL.clone()
    run.DOCTOR.MIN_AP50 = 0.0
    return run


def test_every_loss_is_there_and_reaches_all_that_is_trained(name, tmp_path, make_batch):
    model = build(tiny_pair(name, tmp_path))
    losses = step(model, make_batch())
    own = {k: losses[k] for k in model.distillation.loss_names}
    prefix = f"loss_{name.lower()}_"
    assert own and all(k.startswith(prefix) for k in own)
    assert all(v.isfinite() and v.dim() == 0 for v in own.values())
    assert sum(own.values()) > 0 and set(model.table) and not losses["loss_cls"].isnan()
    for terms in model.table.values():
        assert all(f"loss_{k}" in own and not v.requires_grad for k, v in terms.items())
    sum(own.values()).backward()
    assert all(p.grad is not None for p in model.distillation.parameters())
    body = [p.grad for p in model.student.backbone.bottom_up.parameters()]
    assert sum(g.abs().sum() for g in body if g is not None) > 0
    if model.teacher is not None:
        kept = [p for part in model.teacher.parts.values() for p in part.parameters()]
        assert not any(p.requires_grad or p.grad is not None for p in kept)


def test_images_without_objects_are_finite(name, tmp_path, make_batch):
    model = build(tiny_pair(name, tmp_path))
    batch = make_batch()
    for sample in batch[1:], batch:  # some have none, then all
        for x in sample:
            x["instances"] = x["instances"][:0]
        model.zero_grad()
        losses = step(model, batch)
        assert all(v.isfinite() for v in losses.values())
        sum(losses.values()).backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in found)


def test_at_factor_0_the_student_is_the_plain_one(name, tmp_path, make_batch):
    cfg = tiny_pair(name, tmp_path)
    cfg.MODEL.DISTILLER.FACTOR = 0.0
    distilled, plain = build(cfg), build(student_config(cfg))
    ends = []
    for model in (distilled, plain):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        for _ in range(2):
            losses = step(model, make_batch())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        ends.append(getattr(model, "student", model).state_dict())
    assert all(torch.equal(ends[0][k], v) for k, v in ends[1].items())


def test_its_losses_fall_when_they_are_all_that_is_trained(name, tmp_path, make_batch):
    cfg = tiny_pair(name, tmp_path)
    model, batch = build(cfg), make_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    values = []
    for _ in range(15):
        torch.manual_seed(2)  # the same proposals are sampled
        losses = step(model, batch)
        total = sum(losses[k] for k in model.distillation.loss_names)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert min(values[-3:]) < 0.95 * values[0]


def test_a_resumed_run_is_bit_equal_and_its_student_plain(name, tmp_path):
    cfg = trainable(tiny_pair(name, tmp_path), tmp_path)
    cfg.MODEL.DISTILLER.FACTOR = 1e-3  # of a random teacher
    trainer = train(cfg)
    first, second = Path(cfg.OUTPUT_DIR), tmp_path / "second"
    second.mkdir()
    shutil.copy(first / "model_0000003.pth", second)
    (second / "last_checkpoint").write_text("model_0000003.pth")
    cfg.OUTPUT_DIR = str(second)
    assert train(cfg, resume=True).start_iter == 4
    assert_same_end(first, second)
    final = load(first / "model_final.pth")
    assert final["model"].keys() == build_model(student_config(cfg)).state_dict().keys()
    own = dict(trainer.model.distillation.named_parameters())
    assert own.keys() <= final["distiller"].keys()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in own.values()} <= held
    assert isinstance(trainer, FGDTrainer)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """Gradients of every method on two processes, and the batches they were given."""
    folder = tmp_path_factory.mktemp("ranks")
    batches = halves(make_training_batch)
    configs = {name: tiny_pair(name, folder) for name in METHODS}
    for name, options in ALONE.items():
        configs[name].merge_from_list(list(options))
    texts = {name: cfg.dump() for name, cfg in configs.items()}
    assert launch(distil_on_two, (str(folder), batches, texts), device="cpu", processes=2) == 0
    ranks = [torch.load(folder / f"rank{r}.pth", weights_only=True) for r in range(2)]
    return configs, batches, ranks


def test_two_processes_distil_as_one(name, on_two):
    """DDP's gradient is the mean of what each half of the batch gives alone.

    Without terms in which processes see each other's half (`every.ALONE`).
    """
    configs, batches, ranks = on_two
    alone = []
    for rank, batch in enumerate(batches):
        model = build(configs[name])
        alone.append(gradients(model, batch, rank, model))
    found = ranks[0][name]
    assert all(torch.equal(value, ranks[1][name][key]) for key, value in found.items())
    compared = 0
    for key, value in alone[0].items():
        wanted = (value + alone[1][key]) / 2
        scale = wanted.abs().max().clamp(min=1e-6)
        assert (found[key] - wanted).abs().max() < 1e-4 * scale, key
        compared += bool(wanted.any())
    assert compared > 10, "vacuous: no gradient was compared"
