"""The released code's figures: value, every gradient."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from fgd.methods.batch import Level
from fgd.methods.drkd import DRKD, method
from fgd.methods.drkd.instance import region_features
from tests.fgd.methods.batches import make_batch

FILES = sorted((Path(__file__).parents[3] / "golden" / "drkd").glob("*.npz"))
# The authors' names of modules and ours; {} is the level.
UNIT = {
    "conv_state": "state",
    "conv_proj": "projection",
    "gcn.conv1": "nodes",
    "gcn.conv2": "states",
    "conv_extend": "extend",
    "blocker": "norm",
}
RELATION = {"theta.0": "theta", "phi.0": "phi", "g.0": "g", "W": "W"}
NAMES = {
    **{
        f"{who}_non_local.{{}}.{theirs}": f"pixel.{{}}.{who}.{ours}"
        for who in ("student", "teacher")
        for theirs, ours in UNIT.items()
    },
    **{
        f"{who}_relation.{{}}.{theirs}": f"instance.{{}}.{who}.{ours}"
        for who in ("student", "teacher")
        for theirs, ours in RELATION.items()
    },
    "non_local_adaptation.{}": "pixel.{}.adapt",
    "relation_adaptation.{}": "instance.{}.adapt_relation",
    "for_adaptation.{}": "instance.{}.adapt_feature",
}


def unpack(content, kind, values):
    found, start = {}, 0
    for name, shape in zip(content[f"{kind}_names"], content[f"{kind}_shapes"]):
        shape = [int(x) for x in shape if x]
        end = start + int(np.prod(shape))
        found[name.decode()] = torch.from_numpy(content[values][start:end]).view(shape)
        start = end
    return found


def ours(name):
    """Our name of the authors' parameter ``name``."""
    module, _, kind = name.rpartition(".")
    family, level, *rest = module.split(".")
    return f"{NAMES['.'.join([family, '{}', *rest])].format(level)}.{kind}"


@functools.cache
def load(path):
    content = dict(np.load(path).items())
    parameters = unpack(content, "param", "param_values")
    gradients = unpack(content, "param", "grad_values")
    filters = {}
    if "filter_names" in content:
        filters = unpack(content, "filter", "filter_values")
    return content, parameters, gradients, filters


def build(content, parameters, filters, dtype):
    two_stage = str(content["variant"]) == "two_stage"
    count, stride = int(content["num_levels"]), int(content["first_stride"])
    channels = content["student_0"].shape[1]
    levels = [Level(str(i), channels, channels, str(i), stride * 2**i) for i in range(count)]
    weights = dict(zip(DRKD.terms, (1e-3, 4e-3, 2.4e-3) if two_stage else (0.0, 5e-3, 0.0)))
    nodes = [1]
    if two_stage:
        weight = "student_non_local.{}.conv_proj.weight"
        nodes = [len(parameters[weight.format(i)]) for i in range(count)]
    built = DRKD(levels, weights, "code", "random" if two_stage else "none", nodes).to(dtype)
    named = dict(built.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            named[ours(name)].copy_(value.view_as(named[ours(name)]))

    def recorded(batch, key, regions):
        level, side = key
        names = [
            f"{level}.{n}.{('student', 'teacher')[side]}" if two_stage else ""
            for n in range(len(batch.boxes))
        ]
        pair = lambda name: [filters[f"{name}.{x}"].to(dtype) for x in ("weight", "bias")]  # noqa: E731
        return [pair(name) for name in names if name]

    built._filters = recorded
    return built


def from_the_first_image(features, boxes, scale):
    """The error of the released code, where a batch has several images."""
    return region_features(features[:1].expand(len(features), -1, -1, -1), boxes, scale)


def error(found, wanted):
    """Relative to the largest magnitude of the wanted array, at least 1e-6."""
    wanted = torch.as_tensor(wanted).double().view_as(found)
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_value_and_gradients(path, dtype, tolerance, monkeypatch):
    content, parameters, gradients, filters = load(path)
    drkd = build(content, parameters, filters, dtype)
    count = int(content["num_levels"])
    maps = [
        {str(i): torch.from_numpy(content[f"{who}_{i}"]).to(dtype) for i in range(count)}
        for who in ("student", "teacher")
    ]
    for own in maps[0].values():
        own.requires_grad_()
    boxes = list(torch.from_numpy(content["boxes"]).split(content["num_boxes"].tolist()))
    monkeypatch.setattr(method, "region_features", from_the_first_image)
    table = drkd(make_batch(*maps, boxes, tuple(content["image_size"].tolist())))
    for term in drkd.terms:
        if f"loss_{term}" in content:
            value = sum(x[term].detach() for x in table.values() if term in x)
            assert error(value, content[f"loss_{term}"]) <= tolerance
    total = sum(value for terms in table.values() for value in terms.values())
    total.backward()
    assert error(total.detach(), content["loss"]) <= tolerance
    for i in range(count):
        assert error(maps[0][str(i)].grad, content[f"grad_student_{i}"]) <= tolerance
    named = dict(drkd.named_parameters())
    assert {ours(name) for name in gradients} == {
        name for name in named if "loss_pixel_relation" in content or is_one_stage(name)
    }
    for name, wanted in gradients.items():
        found = named[ours(name)].grad
        if ".phi." in name and name.endswith("bias") and not filters:
            # Adds one number to a row before its softmax: 0 but for rounding.
            assert found.abs().max() < 1e-7 and wanted.abs().max() < 1e-7
        else:
            assert error(found, wanted) <= tolerance, name


def is_one_stage(name):
    return name.startswith("instance.") and "adapt_feature" not in name


def test_with_one_image_nothing_needs_to_be_reproduced():
    ones = [path for path in FILES if len(load(path)[0]["num_boxes"]) == 1]
    assert [path.stem for path in ones] == ["three_levels", "two_levels"]
    features = torch.randn(1, 2, 5, 6)
    boxes = [torch.tensor([[3.0, 4, 20, 30]])]
    same = from_the_first_image(features, boxes, 0.25), region_features(features, boxes, 0.25)
    assert torch.equal(*same)


def test_the_error_of_the_released_code_changes_a_batch():
    content, parameters, _, filters = load(next(x for x in FILES if x.stem == "batch2"))
    drkd = build(content, parameters, filters, torch.float64)
    maps = [
        {str(i): torch.from_numpy(content[f"{who}_{i}"]) for i in range(2)}
        for who in ("student", "teacher")
    ]
    boxes = list(torch.from_numpy(content["boxes"]).split(content["num_boxes"].tolist()))
    table = drkd(make_batch(*maps, boxes, (32, 32)))
    relation = sum(x["instance_relation"] for x in table.values()).item()
    assert 0.01 < abs(relation / content["loss_instance_relation"] - 1) < 0.3


def test_there_are_five_cases():
    assert len(FILES) == 5
