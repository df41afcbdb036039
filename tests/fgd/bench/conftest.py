"""A pair of tiny detectors for the step benchmark, and methods that the product does not know."""

from functools import partial

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from fgd.methods.method import METHOD_REGISTRY, Method
from tests.conftest import make_tiny_cfg

KEPT = torch.Size((500, 400))


class Maps(Method):
    terms = ("distance",)

    def forward(self, batch):
        pairs = {k: (batch.student[k], batch.teacher[k]) for k in batch.student}
        return {k: self.weigh({"distance": s.mean() - t.mean()}) for k, (s, t) in pairs.items()}


class Logits(Method):
    terms = ("distance",)
    needs = frozenset({"teacher", "region_logits"})

    def forward(self, batch):
        own, theirs = batch.regions.student.logits, batch.regions.teacher.logits
        return {"regions": self.weigh({"distance": (own - theirs).square().mean()})}


class _Keep(torch.autograd.Function):
    """0 of any tensor; keeps another one for its backward."""

    @staticmethod
    def forward(ctx, features, kept):
        ctx.save_for_backward(kept)
        ctx.shape = features.shape
        return features.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        assert kept.shape == KEPT
        return gradient.new_zeros(ctx.shape), None


class Alone(Method):
    """Without a teacher, and without maps."""

    terms = ("kept",)
    needs = frozenset()

    def __init__(self, levels, weights):
        super().__init__(levels, weights)
        self.own = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)

    def forward(self, batch):
        return {"all": self.weigh({"kept": _Keep.apply(self.own, self.own.new_zeros(KEPT))})}


class Trained(Maps):
    """With a module on maps."""

    terms = ("kept",)

    def __init__(self, levels, weights):
        super().__init__(levels, weights)
        self.linear = nn.Linear(4, 5)

    def forward(self, batch):
        features = batch.student["p3"]
        return {"p3": self.weigh({"kept": _Keep.apply(features, features.new_zeros(KEPT))})}


class Views(Maps):
    needs = Maps.needs | {"second_view"}


@pytest.fixture(scope="module")
def toys():
    """The methods above are registered; configs have their nodes from now on."""
    methods = (Maps, Logits, Alone, Trained, Views)
    for method in methods:
        METHOD_REGISTRY.register(method)
    yield
    for method in methods:
        METHOD_REGISTRY._obj_map.pop(method.__name__)


def pair_cfg(folder, arch="RetinaNet", trained=False):
    """A distillation config; its teacher's config in ``folder``, the weights if ``trained``."""
    teacher = make_tiny_cfg(arch, channels=24)
    (folder / "teacher.yaml").write_text(teacher.dump())
    cfg = make_tiny_cfg(arch)
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.STUDENT = arch
    cfg.MODEL.DISTILLER.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = "https://example.org/never-fetched.pth"
    cfg.MODEL.WEIGHTS = ""
    if trained:
        path = folder / "teacher.pth"
        torch.save({"model": build_model(teacher).state_dict()}, path)
        cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = str(path)
    return cfg


@pytest.fixture
def config(tmp_path):
    """`pair_cfg` in a folder of its own."""
    return partial(pair_cfg, tmp_path)
