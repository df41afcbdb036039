import re

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file

from fgd.config import check_config
from fgd.detectors.pretrained import timm_normalisation
from fgd.distillation import timm_teacher
from fgd.distillation.needs import reasons
from fgd.distillation.teacher import FrozenTeacher, build_teacher, describe_teacher, load_teacher
from fgd.distillation.timm_teacher import KEY, TimmNetwork, TokenMap, build_timm_teacher
from fgd.errors import UserError
from fgd.weights import state_sha256, weights_sha256
from tests.conftest import make_tiny_cfg
from tests.fgd.training import taught_by_timm

NODE = "MODEL.DISTILLER.TEACHER."
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


@pytest.fixture
def cfg(tmp_path):
    return taught_by_timm(make_tiny_cfg(), tmp_path)


def network(name="test_vit", **options):
    torch.manual_seed(3)
    options = {"dynamic_img_size": True, **options} if "vit" in name else options
    return timm.create_model(name, num_classes=0, **options).eval()


def test_patch_tokens_become_a_map_and_class_and_register_tokens_are_dropped():
    net = network(reg_tokens=4)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens, found = net.forward_features(images), TokenMap(net)(images)
    assert tokens.shape == (2, 1 + 4 + 6, 64) and list(found) == ["tokens"]
    for n, row, column in ((0, 0, 0), (0, 1, 2), (1, 1, 0)):
        assert torch.equal(found["tokens"][n, :, row, column], tokens[n, 5 + 3 * row + column])


def test_images_are_normalised_as_the_tag_says_whatever_the_students_channels(
    cfg, make_batch, monkeypatch
):
    name = "vit_small_patch16_224.dino"
    monkeypatch.setattr(timm_teacher, "create_model", lambda *_, **__: network())
    cfg.MODEL.DISTILLER.TEACHER.TIMM = name
    model, config = build_timm_teacher(cfg)
    assert (config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD) == IMAGENET
    (sample,) = make_batch([(64, 96)])  # in BGR
    image = sample["image"]
    taught = FrozenTeacher(model, config.INPUT.FORMAT, "BGR").look([sample], (64, 128))
    padded = torch.zeros(1, 3, 64, 128)  # after normalising: the mean colour
    for channel in range(3):
        mean, std = (values[channel] for values in IMAGENET)
        padded[0, channel, :, :96] = (image[2 - channel] - mean) / std
    with torch.no_grad():
        wanted = model.network.eval().forward_features(padded)[0, 1:].T.reshape(64, 4, 8)
    torch.testing.assert_close(taught.maps["tokens"][0], wanted, rtol=1e-5, atol=1e-5)


def test_the_tag_decides_the_normalisation():
    name = "vit_small_patch16_224"
    for tag, mean in (("augreg_in21k", [127.5] * 3), ("dino", IMAGENET[0])):
        assert timm_normalisation(KEY, f"{name}.{tag}").mean == mean
    assert timm_normalisation(KEY, "vit_base_patch16_gap_224").mean  # none is known
    with pytest.raises(UserError, match="TIMM 'test_vit.nothing'.*Invalid pretrained tag"):
        timm_normalisation(KEY, "test_vit.nothing")


def test_a_map_covers_the_images_whatever_their_size():
    net = network()
    images = torch.randn(1, 3, 50, 81)
    with torch.no_grad():
        found = TokenMap(net)(images)["tokens"]
        resized = torch.nn.functional.interpolate(images, (64, 96), mode="bilinear")
        wanted = TokenMap(net)(resized)["tokens"]
    assert found.shape == (1, 64, 4, 6) and torch.equal(found, wanted)


def test_twice_the_stride_shows_the_images_at_half_size():
    net = network()
    images = torch.randn(1, 3, 64, 96)
    half = TokenMap(net, stride=32)
    assert half.output_shape()["tokens"] == ShapeSpec(channels=64, stride=32)
    with torch.no_grad():
        pooled = images.unflatten(3, (48, 2)).unflatten(2, (32, 2)).mean(dim=(3, 5))
        wanted = TokenMap(net)(pooled)["tokens"]
        torch.testing.assert_close(half(images)["tokens"], wanted)
        assert TokenMap(net, stride=80)(images)["tokens"].shape == (1, 64, 1, 2)


@pytest.mark.parametrize(
    "name, channels, stride", [("test_convnext", 64, 32), ("test_mambaout", 64, 32)]
)
def test_networks_with_a_map_in_either_order_of_dimensions(name, channels, stride):
    net = network(name)
    images = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        features, found = net.forward_features(images), TokenMap(net)
        value = found(images)["tokens"]
    assert found.output_shape()["tokens"] == ShapeSpec(channels=channels, stride=stride)
    if name == "test_mambaout":
        features = features.permute(0, 3, 1, 2)
    assert torch.equal(value, features) and value.shape[2:] == (2, 4)


@pytest.mark.parametrize("name", ["test_vit_relpos", "test_maxvit"])
def test_networks_of_one_size_are_refused_in_one_line(name):
    with pytest.raises(UserError, match="has no map of 4x6 cells.*cannot teach on images of any"):
        TimmNetwork(name, *IMAGENET)


def edit(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


FAULTS = {
    "1 not in the file (blocks.0.norm1.weight)": lambda s: s.pop("blocks.0.norm1.weight"),
    "1 of another shape (norm.bias": lambda s: s.update({"norm.bias": s["norm.bias"][1:]}),
    "1 in the file only (extra.weight)": lambda s: s.update({"extra.weight": torch.zeros(1)}),
    "1 with NaN or infinite values (norm.bias)": lambda s: s["norm.bias"].fill_(float("nan")),
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_file_that_is_not_complete_is_refused(cfg, text):
    edit(cfg.MODEL.DISTILLER.TEACHER.WEIGHTS, FAULTS[text])
    with pytest.raises(UserError, match=rf"teacher weights .*{re.escape(text)}"):
        build_teacher(cfg)
    cfg.MODEL.DISTILLER.TEACHER.ALLOW_PARTIAL_WEIGHTS = True
    if "NaN" not in text:
        assert load_teacher(cfg).report.loaded > 70


def test_the_classifier_of_a_file_is_left_out_and_named(cfg, tmp_path):
    node = cfg.MODEL.DISTILLER.TEACHER
    state = torch.load(node.WEIGHTS, weights_only=True)
    model, _, report = load_teacher(cfg)
    assert report.left_out == ["head.bias", "head.weight"] and not report.unexpected
    assert "2 of the file left out (head.bias, head.weight)" in report.summary()
    own = model.network.state_dict()
    assert own.keys() == state.keys() - {"head.bias", "head.weight"}
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    node.WEIGHTS = str(tmp_path / "model.safetensors")  # as timm's hub has them
    save_file(own, node.WEIGHTS)
    model, _, report = load_teacher(cfg)
    assert report.left_out == [] and report.loaded == len(own)
    assert torch.equal(model.network.norm.weight, own["norm.weight"])
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_teacher(cfg)


def test_without_a_file_timms_own_weights_are_taken(cfg, monkeypatch):
    cfg.MODEL.DISTILLER.TEACHER.WEIGHTS = ""
    trained, asked = network(), []

    def create(name, pretrained, **options):
        asked.append((name, pretrained))
        return trained if pretrained else network()

    with torch.no_grad():
        trained.norm.weight.fill_(2)
    monkeypatch.setattr(timm_teacher, "create_model", create)
    model, _, report = load_teacher(cfg)
    assert asked == [("test_vit", False), ("test_vit", True)] and report.loaded == 78
    assert model.network is not trained and (model.network.norm.weight == 2).all()

    before = torch.get_rng_state()
    known = describe_teacher(cfg)
    assert known == {"weights": "timm:test_vit", "sha256": state_sha256(trained)}
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        trained.norm.bias[3] += 1
    assert describe_teacher(cfg)["sha256"] != known["sha256"]

    def fail(name, pretrained, **options):
        if pretrained:
            raise OSError("no route\nto host")
        return network()

    monkeypatch.setattr(timm_teacher, "create_model", fail)
    with pytest.raises(UserError, match=r"'test_vit' could not be loaded \(OSError: no route to"):
        load_teacher(cfg)


def test_a_file_is_known_by_its_hash(cfg):
    path = cfg.MODEL.DISTILLER.TEACHER.WEIGHTS
    assert describe_teacher(cfg) == {"weights": path, "sha256": weights_sha256(path)}


def test_it_teaches_and_is_part_of_nothing(cfg, make_batch):
    cfg.MODEL.DISTILLER.TEACHER.PRECISION = "bfloat16"
    model = build_model(cfg).train()
    assert f"teacher test_vit from {cfg.MODEL.DISTILLER.TEACHER.WEIGHTS}" in model.describe()
    with EventStorage():
        losses = model(make_batch())
    own = [losses[name] for name in model.distillation.loss_names]
    assert all(value.isfinite() for value in own) and losses["loss_fgd_background"] > 0
    sum(own).backward()
    backbone = model.teacher.backbone
    assert isinstance(backbone, TokenMap) and not backbone.training
    owned = {id(x) for x in (*backbone.parameters(), *backbone.buffers())}
    assert not owned & {id(x) for x in (*model.parameters(), *model.buffers())}
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    assert model.student.backbone.bottom_up.body.conv_stem.weight.grad.abs().sum() > 0


REFUSED = {
    (f"{NODE}CONFIG_FILE", "a.yaml"): "TIMM 'test_vit' and TEACHER.CONFIG_FILE 'a.yaml'",
    ("MODEL.DISTILLER.INHERIT", True): "INHERIT: the teacher test_vit .* has no neck",
    (f"{NODE}TIMM", "vit_nothing"): "TIMM 'vit_nothing' is not a timm model",
    (f"{NODE}TIMM_STRIDE", -1): "TIMM_STRIDE: -1 is not a number of pixels",
    (f"{NODE}TIMM", "vit_base_patch16_siglip_gap_224", f"{NODE}WEIGHTS", ""): None,
    (f"{NODE}TIMM", "vit_base_patch16_gap_224", f"{NODE}WEIGHTS", ""): "no pretrained",
    (f"{NODE}TIMM", "", f"{NODE}TIMM_STRIDE", 32): "TIMM_STRIDE: 32 is of a network of timm",
    (f"{NODE}TIMM", "", f"{NODE}WEIGHTS", ""): "TEACHER.WEIGHTS is empty",
}


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_keys_that_do_not_go_together(cfg, options):
    cfg.merge_from_list(list(options))
    if REFUSED[options] is None:
        return check_config(cfg)
    with pytest.raises(UserError, match=REFUSED[options]):
        check_config(cfg)


def test_methods_that_need_heads_or_other_strides_are_refused(cfg):
    cfg.MODEL.DISTILLER.LEVELS = ["p3"]
    with pytest.raises(UserError, match="no level of stride 8 for 'p3'"):
        build_model(cfg)
    cfg.merge_from_list([f"{NODE}TIMM_STRIDE", 8])
    assert build_model(cfg).sources["p3"].output == "p3"
    missing = reasons(build_model(make_tiny_cfg("GeneralizedRCNN")), build_teacher(cfg)[0], True)
    assert missing["regions"] == "the teacher, TimmNetwork, has no RoI heads over a pyramid"


def test_a_student_in_grey_is_refused(cfg):
    model, config = build_timm_teacher(cfg)
    with pytest.raises(UserError, match="'RGB' cannot be made from the student's 'L'"):
        FrozenTeacher(model, config.INPUT.FORMAT, "L")
