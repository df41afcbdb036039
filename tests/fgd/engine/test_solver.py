import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn

from fgd.config import get_fgd_cfg
from fgd.engine.solver import build_lr_scheduler, build_optimizer, check_solver
from fgd.errors import DivergedError, UserError
from tests.tiny_vit import vit_cfg


def solver_cfg(**keys):
    cfg = get_fgd_cfg()
    cfg.MODEL.DEVICE = "cpu"
    for name, value in keys.items():
        node = cfg.SOLVER.CLIP_GRADIENTS if name in cfg.SOLVER.CLIP_GRADIENTS else cfg.SOLVER
        node[name] = value
    return cfg


def make_model():
    """Conv with bias, batch norm, and a frozen layer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    return model


def settings(optimizer):
    return [
        {k: v for k, v in group.items() if k != "params"} | {"count": len(group["params"])}
        for group in optimizer.param_groups
    ]


def test_sgd_is_detectron2s_own():
    cfg, model = solver_cfg(WEIGHT_DECAY_NORM=0.5, BASE_LR=0.3), make_model()
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.SGD
    assert settings(optimizer) == settings(detectron2_build_optimizer(cfg, model))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4  # none is frozen


def test_adamw_takes_the_same_groups_and_keys():
    cfg = solver_cfg(OPTIMIZER="AdamW", BASE_LR=0.3, WEIGHT_DECAY=0.25, WEIGHT_DECAY_NORM=0.5)
    optimizer = build_optimizer(cfg, make_model())
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups}
    assert decays == {(0.3, 0.25, 2), (0.3, 0.5, 2)}


# Of SOLVER.BASE_LR 0.8 and LAYER_DECAY 0.5, computed by hand: two blocks.
RATES = {
    "pos_embed": 0.1,  # 0.5^3
    "cls_token": 0.1,
    "patch_embed.proj.weight": 0.1,
    "patch_embed.proj.bias": 0.1,
    "blocks.0.attn.qkv.weight": 0.2,  # 0.5^2
    "blocks.0.norm1.bias": 0.2,
    "blocks.1.mlp.fc2.bias": 0.4,  # 0.5^1
    "blocks.1.norm2.weight": 0.4,
}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_layers_of_a_vision_transformer_learn_by_vitdets_rule(optimizer):
    model, keys = build_model(vit_cfg("RetinaNet")), {"OPTIMIZER": optimizer, "LAYER_DECAY": 0.5}
    cfg = solver_cfg(BASE_LR=0.8, WEIGHT_DECAY=0.3, WEIGHT_DECAY_NORM=0.0, **keys)
    built = build_optimizer(cfg, model)
    groups = {p: group for group in built.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in built.param_groups)
    assert groups.keys() == set(model.parameters())
    prefix, seen = "backbone.bottom_up.body.model.", set()
    for name, parameter in model.named_parameters():
        found, inside = groups[parameter], name.removeprefix(prefix)
        block = {"blocks.0": 0.2, "blocks.1": 0.4}.get(inside[:8], 0.1)
        assert found["lr"] == pytest.approx(block if inside != name else 0.8), name
        assert found["lr"] == pytest.approx(RATES.get(inside, found["lr"])), name
        seen.add(inside)
        undecayed = inside == "pos_embed" or "norm" in name
        assert found["weight_decay"] == (0.0 if undecayed else 0.3), name
    assert seen > RATES.keys()
    cfg.SOLVER.LAYER_DECAY = 1.0
    built = build_optimizer(cfg, model)
    assert {group["lr"] for group in built.param_groups} == {0.8}
    (undecayed,) = (
        x
        for x in built.param_groups
        if model.backbone.bottom_up.body.model.pos_embed in set(x["params"])
    )
    assert undecayed["weight_decay"] == 0.0


def test_the_schedule_keeps_the_ratios_of_layers():
    cfg = solver_cfg(BASE_LR=0.8, LAYER_DECAY=0.5, MAX_ITER=10, STEPS=(5,), WARMUP_ITERS=2)
    optimizer = build_optimizer(cfg, build_model(vit_cfg("RetinaNet")))
    schedule, rates = build_lr_scheduler(cfg, optimizer), set()
    for _ in range(10):
        present = sorted({group["lr"] for group in optimizer.param_groups})
        assert [x / present[-1] for x in present] == pytest.approx([0.125, 0.25, 0.5, 1.0])
        rates.add(round(present[-1], 6))
        optimizer.step()
        schedule.step()
    assert {0.8, 0.08} < rates


def two_parameters(first, second):
    """Two one-element parameters, in groups of their own, with the given gradients."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=True))
    model[1].bias.requires_grad_(False)
    model[0].weight.grad = torch.tensor([[first]])
    model[1].weight.grad = torch.tensor([second])
    return model


def step(cfg, model):
    """What one SGD step of rate 1 subtracts from both parameters."""
    optimizer = build_optimizer(cfg, model)
    before = model[0].weight.item(), model[1].weight.item()
    optimizer.step()
    return pytest.approx((before[0] - model[0].weight.item(), before[1] - model[1].weight.item()))


@pytest.mark.parametrize(
    ("clip_type", "applied"),
    [("full_model", (0.6, 0.8)), ("norm", (1.0, 1.0)), ("value", (1.0, 1.0))],
)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_full_model_clipping_keeps_the_direction(clip_type, applied, optimizer):
    keys = {"BASE_LR": 1.0, "WEIGHT_DECAY": 0.0, "WEIGHT_DECAY_NORM": 0.0, "OPTIMIZER": optimizer}
    keys |= {"ENABLED": True, "CLIP_TYPE": clip_type, "CLIP_VALUE": 1.0}
    model = two_parameters(3.0, 4.0)
    moved = step(solver_cfg(**keys), model)
    assert (model[0].weight.grad.item(), model[1].weight.grad.item()) == pytest.approx(applied)
    if optimizer == "SGD":
        assert moved == applied


def test_small_gradients_are_not_scaled_up():
    cfg = solver_cfg(BASE_LR=1.0, ENABLED=True, CLIP_TYPE="full_model", CLIP_VALUE=35.0)
    cfg.SOLVER.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    assert step(cfg, two_parameters(3.0, 4.0)) == (3.0, 4.0)


def test_clipping_sees_unscaled_gradients_under_amp():
    cfg = solver_cfg(BASE_LR=1.0, ENABLED=True, CLIP_TYPE="full_model", CLIP_VALUE=1.0)
    cfg.SOLVER.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    model = two_parameters(0.0, 0.0)
    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = model[0].weight.item()
    scaler.scale(model[0].weight.sum() * 0.5).backward()  # norm 0.5, scaled 512
    scaler.step(optimizer)
    assert before - model[0].weight.item() == pytest.approx(0.5)
    scaler.update()
    scaler.scale(model[0].weight.sum() * float("inf")).backward()
    scaler.step(optimizer)  # an overflow is skipped, not reported as divergence
    assert before - model[0].weight.item() == pytest.approx(0.5)


def test_nonfinite_norm_stops_before_the_step():
    cfg = solver_cfg(ENABLED=True, CLIP_TYPE="full_model", CLIP_VALUE=1.0)
    model = two_parameters(float("nan"), 1.0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DivergedError, match="norm is nan"):
        build_optimizer(cfg, model).step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"OPTIMIZER": "Adam"}, "SOLVER.OPTIMIZER: 'Adam' is neither"),
        ({"ENABLED": True, "CLIP_TYPE": "all"}, "CLIP_TYPE: 'all' is not one of value, norm"),
        ({"LAYER_DECAY": 0.0}, r"SOLVER.LAYER_DECAY: 0.0 is not in \(0, 1\]; ViTDet's are 0.7"),
        ({"LAYER_DECAY": 1.5}, r"SOLVER.LAYER_DECAY: 1.5 is not in \(0, 1\]"),
        ({"LAYER_DECAY": 0.7}, "0.7: MODEL.BACKBONE.NAME build_resnet_backbone has no vision"),
        ({"AMP": {"ENABLED": True}}, "mixed precision needs CUDA, but MODEL.DEVICE is 'cpu'"),
    ],
)
def test_mistakes_are_named(keys, message):
    cfg = solver_cfg(**{k: v for k, v in keys.items() if k != "AMP"})
    cfg.SOLVER.AMP.ENABLED = "AMP" in keys
    with pytest.raises(UserError, match=message):
        check_solver(cfg)


@pytest.mark.parametrize(
    "keys", [{"STEPS": (10,)}, {"STEPS": (5, 2)}, {"LR_SCHEDULER_NAME": "Poly"}]
)
def test_impossible_schedules_are_explained(keys):
    cfg = solver_cfg(MAX_ITER=10, **keys)
    with pytest.raises(UserError, match="MAX_ITER 10: .*steps must increase"):
        build_lr_scheduler(cfg, build_optimizer(cfg, make_model()))


def test_cosine_schedule_warms_up_and_ends_near_zero():
    cfg = solver_cfg(MAX_ITER=10, BASE_LR=1.0, WARMUP_ITERS=2, LR_SCHEDULER_NAME="WarmupCosineLR")
    optimizer = build_optimizer(cfg, make_model())
    schedule = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # Half a cosine over ten steps; the first two rise from WARMUP_FACTOR 0.001 to its value at 2.
    cosine = [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    assert rates[2:] == pytest.approx(cosine[2:])
    assert rates[:2] == pytest.approx([0.001, (0.001 + cosine[2]) / 2])


def test_defaults_pass_the_check():
    check_solver(solver_cfg())
