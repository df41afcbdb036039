import copy
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from fgd.config import check_config, load_config_text
from fgd.distillation.schedule import Schedule
from fgd.engine.adaptive import AdaptiveWeight, Rule, adapted, fed_parameters
from fgd.engine.trainer import FGDTrainer
from fgd.errors import UserError
from fgd.processes.launch import launch
from tests.conftest import make_tiny_cfg
from tests.fgd.training import distilled, training_cfg

from .test_trainer import assert_same_end, load, train

ADAPT = "MODEL.DISTILLER.ADAPT."
ALL = Rule(50.0, 50.0)  # changes nothing

# The rule


@pytest.mark.parametrize(
    "share, factor",
    [
        (5.0, 0.12 * 0.95 / (0.05 * 0.88)),  # 2.59, to the far bound
        (20.0, 0.10 * 0.80 / (0.20 * 0.90)),
        (9.99, 0.12 * 0.9001 / (0.0999 * 0.88)),
        (10.0, 1.0),
        (11.3, 1.0),
        (12.0, 1.0),
        (0.5, 10.0),  # 27 times, limited
        (99.0, 0.1),
        (100.0, 0.1),
    ],
)
def test_a_planted_share_changes_the_multiplier(share, factor):
    for multiplier in (1.0, 3.5):
        assert adapted(multiplier, share, Rule()) == pytest.approx(multiplier * factor, rel=1e-12)


def test_keys_of_the_rule():
    assert round(adapted(1.0, 5.0, Rule()), 2) == 2.59
    assert adapted(7.0, 1e-7, Rule(default=4.0)) == 4.0
    assert adapted(7.0, 0.0, Rule()) == 1.0
    assert adapted(2.0, 1.0, Rule(least=0.5, most=3.0)) == 6.0
    assert adapted(2.0, 90.0, Rule(least=0.5, most=3.0)) == 1.0
    assert adapted(2.0, 30.0, Rule(60.0, 40.0)) == 2.0
    assert adapted(2.0, 10.0, Rule(60.0, 40.0)) == 20.0  # a bound of 100 % has no finite ratio
    for share in (0.001, 40.0, 100.0):
        assert adapted(1.5, share, ALL) == 1.5


def test_the_share_becomes_the_far_bound_where_distillation_alone_feeds_the_layers():
    draw = random.Random(0)
    for _ in range(200):
        fed, rest, weight = (draw.uniform(0.1, 5) for _ in range(3))
        rule = Rule(draw.uniform(20, 70), draw.uniform(0, 10), 1e-9, 1e9)
        share = 100 * weight * fed / (weight * fed + rest)
        new = adapted(weight, share, rule)
        after = 100 * new * fed / (new * fed + rest)
        low, high = rule.target - rule.band, rule.target + rule.band
        wanted = high if share < low else low if share > high else share
        assert after == pytest.approx(wanted, rel=1e-9)


# The measurement


class Net(nn.Module):
    """Of six trained numbers two are fed."""

    def __init__(self):
        super().__init__()
        self.fed, self.rest = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))
        self.unused = nn.Parameter(torch.zeros(3))
        self.schedule, self.multiplier = Schedule(0.5), 1.0


def make_hook(period=2, rule=Rule(50.0, 10.0)):  # noqa: B008
    net = Net()
    hook = AdaptiveWeight(net, [net.fed], period, rule)
    hook.trainer = SimpleNamespace(iter=0, storage=EventStorage(0))
    return net, hook


def step(net, hook, fed, rest):
    """A step with these gradients; returns what it logged."""
    net.fed.grad, net.rest.grad = torch.tensor(fed), torch.tensor(rest)
    hook.measure()
    with EventStorage(hook.trainer.iter) as hook.trainer.storage:
        hook.after_step()
        logged = {k: v[0] for k, v in hook.trainer.storage.latest().items()}
    hook.trainer.iter += 1
    return logged


def test_shares_are_of_absolute_values_and_their_mean_counts():
    net, hook = make_hook()
    assert step(net, hook, [1.0, -2.0], [[-1.0, 2.0], [3.0, 0.0]]) == {}  # 3 of 9
    assert net.multiplier == 1
    found = step(net, hook, [1.0, 0.0], [[-9.0, 0.0], [0.0, 0.0]])  # 1 of 10
    share = 100 * (1 / 3 + 1 / 10) / 2
    assert found == {"distillation_share": pytest.approx(share, rel=1e-6)}
    assert net.multiplier == pytest.approx(adapted(1.0, share, hook.rule), rel=1e-6)
    (change,) = hook.changes
    assert (change["iteration"], change["multiplier"]) == (2, net.multiplier)
    for _ in range(2):  # a new period begins: 50 %, nothing changes
        found = step(net, hook, [2.0, 2.0], [[4.0, 0.0], [0.0, 0.0]])
    assert found == {"distillation_share": 50} and len(hook.changes) == 1


def test_a_loss_scale_is_not_felt_and_steps_that_overflow_are_left_out():
    inf, nan = float("inf"), float("nan")
    net, hook = make_hook(period=5, rule=ALL)
    step(net, hook, [2.0**16, -2.0 * 2**16], [[7.0 * 2**16, 0.0], [0.0, 0.0]])
    step(net, hook, [1.0, 1.0], [[inf, 0.0], [0.0, 0.0]])
    step(net, hook, [nan, 1.0], [[1.0, 0.0], [0.0, 0.0]])
    step(net, hook, [0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]])
    assert step(net, hook, [1.0, 0.0], [[1.0, 0.0], [0.0, 0.0]]) == {"distillation_share": 40}


def test_steps_below_the_full_factor_are_not_measured():
    net, hook = make_hook(period=1)
    net.schedule = Schedule(0.5, start=1, stop=4, warmup=2)  # 0, 0.25, 0.5, 0.5, 0
    found = [step(net, hook, [0.0, 1.0], [[0.0, 0.0], [0.0, 9.0]]) for _ in range(5)]
    assert found == [{}, {}, *[{"distillation_share": pytest.approx(10)}] * 2, {}]
    assert len(hook.changes) == 2


def test_layers_without_gradient_get_the_default():
    net, hook = make_hook(period=1, rule=Rule(default=3.0))
    step(net, hook, [0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    assert net.multiplier == 3 and hook.changes[0]["share"] == 0


# The layers


@pytest.fixture(scope="module")
def distiller(tmp_path_factory):
    """Factory of a Distiller that distils these levels."""
    folder = tmp_path_factory.mktemp("layers")
    cfg = distilled(make_tiny_cfg(), folder)

    def make(levels):
        own = cfg.clone()
        own.MODEL.DISTILLER.LEVELS = levels
        return build_model(own)

    return make


def parts(names):
    return {"body" if k.startswith("backbone.bottom_up.") else k.split(".")[1] for k in names}


def test_layers_follow_from_what_is_distilled(distiller):
    neck = {"fpn_lateral3", "fpn_lateral4", "fpn_lateral5", "fpn_output3", "fpn_output4"}
    neck |= {"fpn_output5", "top_block"}
    model = distiller(["p3", "p5"])
    assert parts(fed_parameters(model)) == neck
    assert parts(fed_parameters(distiller(["res5"]))) == {"body"}
    assert parts(fed_parameters(distiller(["p4", "res5"]))) == neck | {"body"}
    model.sources = {}  # of a method without maps
    assert parts(fed_parameters(model)) == neck
    own = dict(model.student.named_parameters())
    assert all(own[k] is p for k, p in fed_parameters(model).items())


def test_layers_can_be_named(distiller):
    model = distiller(["p3"])
    found = fed_parameters(model, ["head.cls_subnet", "backbone.fpn_lateral3.weight"])
    assert set(found) == {
        "head.cls_subnet.0.weight",
        "head.cls_subnet.0.bias",
        "backbone.fpn_lateral3.weight",
    }
    with pytest.raises(UserError, match="ADAPT.MODULES: .* is in 'backbone.fpn_lateral'"):
        fed_parameters(model, ["head", "backbone.fpn_lateral"])
    for parameter in fed_parameters(model).values():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is trained .*ADAPT.MODULES"):
        fed_parameters(model)


# Training


def adaptive_cfg(folder, *opts):
    torch.manual_seed(7)  # of the teacher
    cfg = distilled(training_cfg(folder), folder)
    cfg.MODEL.DISTILLER.FACTOR = 1e-3  # of a random teacher
    own = {"ENABLED": True, "PERIOD": 3, "TARGET": 30.0, "BAND": 0.5}
    options = [x for key, value in own.items() for x in (f"{ADAPT}{key}", value)]
    cfg.merge_from_list([*options, *opts])
    return cfg


def hook_of(folder, name="model_final.pth"):
    return load(Path(folder) / name)["trainer"]["hooks"]["AdaptiveWeight"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config and folder of 8 steps in periods of 3; the checkpoint after 4 is amid one."""
    folder = tmp_path_factory.mktemp("adaptive")
    cfg = adaptive_cfg(folder)
    train(cfg)
    return cfg, folder / "out"


def test_the_factor_in_the_log_is_the_product_and_changes_are_recorded(run):
    _, out = run
    lines = [json.loads(x) for x in (out / "metrics.json").read_text().splitlines()]
    state = hook_of(out)
    assert [x["iteration"] for x in state["changes"]] == [3, 6]
    assert all(not 29.5 <= x["share"] <= 30.5 for x in state["changes"])
    expected, multiplier = [], 1.0
    for change in state["changes"]:
        multiplier = adapted(multiplier, change["share"], Rule(30.0, 0.5))
        expected.append(multiplier)
    assert [x["multiplier"] for x in state["changes"]] == expected
    assert state["multiplier"] == multiplier != 1
    logged = {k: v for line in lines for k, v in line.items()}
    assert logged["distillation_factor"] == pytest.approx(1e-3 * multiplier, rel=1e-12)
    assert logged["distillation_share"] == pytest.approx(state["changes"][-1]["share"])
    assert hook_of(out, "model_0000003.pth")["sums"][1] == 1  # step 3, of the second period


def test_a_run_resumed_amid_a_period_is_bit_equal(run, tmp_path):
    cfg, first = run
    cfg, second = cfg.clone(), tmp_path / "second"
    second.mkdir()
    shutil.copy(first / "model_0000003.pth", second)
    (second / "last_checkpoint").write_text("model_0000003.pth")
    cfg.OUTPUT_DIR = str(second)
    assert train(cfg, resume=True).start_iter == 4
    assert_same_end(first, second)


def test_what_is_measured_is_the_gradient_before_clipping(tmp_path):
    clip = "SOLVER.CLIP_GRADIENTS."
    shares = []
    for number, kind in enumerate(("none", "value", "norm", "full_model")):
        options = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), f"{ADAPT}PERIOD", 1)
        if kind != "none":
            options += (f"{clip}ENABLED", True, f"{clip}CLIP_TYPE", kind, f"{clip}CLIP_VALUE", 1e-3)
        cfg = adaptive_cfg(tmp_path, *options, "OUTPUT_DIR", str(tmp_path / str(number)))
        train(cfg)
        shares.append(hook_of(cfg.OUTPUT_DIR)["changes"][0]["share"])
    assert len(set(shares)) == 1 and 0 < shares[0] < 100


def test_the_share_is_that_of_the_gradients_of_all_losses(tmp_path):
    cfg = adaptive_cfg(tmp_path, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), f"{ADAPT}PERIOD", 1)
    torch.manual_seed(cfg.SEED)
    trainer = FGDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    model, batch = copy.deepcopy(trainer.model), trainer.stream.first_batches(1)[0]
    trainer.train()
    with EventStorage(0):
        sum(model.train()(batch).values()).backward()
    sizes = {k: p.grad.double().abs().sum().item() for k, p in model.named_parameters()}
    prefix = "student.backbone."
    neck = [k for k in sizes if k.startswith(prefix) and "bottom_up" not in k]
    share = 100 * sum(sizes[k] for k in neck) / sum(sizes.values())
    assert len(neck) == 16 and any(k.startswith("distillation.") for k in sizes)
    assert hook_of(cfg.OUTPUT_DIR)["changes"][0]["share"] == pytest.approx(share, rel=1e-5)


def test_off_there_is_no_hook(tmp_path):
    trainer = FGDTrainer(adaptive_cfg(tmp_path, f"{ADAPT}ENABLED", False))
    assert not [x for x in trainer._hooks if isinstance(x, AdaptiveWeight)]
    assert trainer._trainer.watch_gradients is None and trainer.model.multiplier == 1


def test_a_period_is_an_epoch_unless_said(tmp_path):
    trainer = FGDTrainer(adaptive_cfg(tmp_path, f"{ADAPT}PERIOD", 0, "SOLVER.IMS_PER_BATCH", 4))
    (hook,) = [x for x in trainer._hooks if isinstance(x, AdaptiveWeight)]
    assert hook.period == 2  # 6 images in batches of 4


def adapt_on_two(folder, text):
    """In each of two processes: two steps of the same run; leaves the hook's state."""
    training_cfg(Path(folder))  # registers the data here
    torch.manual_seed(comm.get_rank())
    trainer = FGDTrainer(load_config_text(text, "test"))
    trainer.resume_or_load(resume=False)
    trainer.train()
    (hook,) = [x for x in trainer._hooks if isinstance(x, AdaptiveWeight)]
    torch.save(hook.state_dict(), Path(folder) / f"rank{comm.get_rank()}.pth")
    return 0


def test_two_processes_come_to_the_same(tmp_path):
    cfg = adaptive_cfg(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), f"{ADAPT}PERIOD", 1)
    cfg.DATASETS.TEST = ()
    assert launch(adapt_on_two, (str(tmp_path), cfg.dump()), device="cpu", processes=2) == 0
    states = [load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    assert states[0] == states[1] and len(states[0]["changes"]) == 2


REFUSED = {
    ("MODEL.DISTILLER.METHOD", "", "MODEL.DISTILLER.INHERIT", True): 'with METHOD "" there is no',
    ("MODEL.DISTILLER.SCHEDULE.DECAY", "linear"): "work against SCHEDULE.DECAY 'linear'",
    (f"{ADAPT}BAND", 31.0): "TARGET 30.0 ± BAND 31.0 is not a band within 0 to 100 %",
    (f"{ADAPT}TARGET", 99.9): "TARGET 99.9 ± BAND 0.5 is not",
    (f"{ADAPT}TARGET", 0.0, f"{ADAPT}BAND", 0.0): "TARGET 0.0 ± BAND 0.0 is not",
    (f"{ADAPT}TARGET", float("nan")): "TARGET nan",
    (f"{ADAPT}PERIOD", -1): "PERIOD: -1 is not a number of iterations",
    (f"{ADAPT}LEAST", 1.5): "LEAST 1.5 and MOST 10.0 must be",
    (f"{ADAPT}LEAST", 0.0): "LEAST 0.0 and",
    (f"{ADAPT}MOST", float("inf")): "MOST inf",
    (f"{ADAPT}DEFAULT", 0.0): "DEFAULT: 0.0 is not a finite multiplier",
}


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_keys_that_mean_nothing(options, tmp_path):
    cfg = adaptive_cfg(tmp_path, *options)
    with pytest.raises(UserError, match=r"MODEL\.DISTILLER\.ADAPT") as caught:
        check_config(cfg)
    assert REFUSED[options] in str(caught.value)
    cfg.MODEL.DISTILLER.ADAPT.ENABLED = False
    check_config(cfg)
