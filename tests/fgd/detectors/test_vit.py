"""Vision transformers of timm under ViTDet's simple pyramid, over one square."""

import pytest
import timm
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from fgd.config import check_config, get_fgd_cfg
from fgd.detectors.vit import VisionTransformer
from fgd.errors import UserError
from tests.tiny_vit import SQUARE, vit_cfg


def shapes(maps):
    return {name: tuple(x.shape[1:]) for name, x in maps.items()}


@pytest.mark.parametrize(
    "arch, top_block, sides",
    [
        ("GeneralizedRCNN", "default", {2: 32, 3: 16, 4: 8, 5: 4, 6: 2}),
        ("GeneralizedRCNN", "none", {2: 32, 3: 16, 4: 8, 5: 4}),
        ("RetinaNet", "default", {3: 16, 4: 8, 5: 4, 6: 2, 7: 1}),
        ("RetinaNet", "maxpool", {3: 16, 4: 8, 5: 4, 6: 2}),
    ],
)
def test_levels_of_the_pyramid(arch, top_block, sides):
    cfg = vit_cfg(arch)
    cfg.MODEL.TIMM.TOP_BLOCK = top_block
    backbone = build_backbone(cfg)
    assert shapes(backbone(torch.zeros(2, 3, SQUARE, SQUARE))) == {
        f"p{k}": (16, side, side) for k, side in sides.items()
    }
    found = {k: (x.channels, x.stride) for k, x in backbone.output_shape().items()}
    assert found == {f"p{k}": (16, 2**k) for k in sides}
    assert (backbone.size_divisibility, backbone.square_size) == (SQUARE, SQUARE)
    assert backbone.bottom_up.output_shape()["tokens"].stride == 16


def test_every_level_is_computed_as_in_vitdet():
    """By hand, from the tokens and the parameters under Detectron2's names."""
    backbone = build_backbone(vit_cfg()).eval()
    for parameter in backbone.parameters():  # norms begin at 1 and 0
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.rand(1, 3, SQUARE, SQUARE)
    state = {k: v for k, v in backbone.state_dict().items() if k.startswith("simfp_")}
    used = set()

    def of(module, kind):
        used.add(f"{module}.{kind}")
        return state[f"{module}.{kind}"]

    def norm(x, module):
        x = x.movedim(1, -1)
        x = F.layer_norm(x, x.shape[-1:], of(module, "weight"), of(module, "bias"), 1e-6)
        return x.movedim(-1, 1)

    def conv(x, module, padding):
        return norm(F.conv2d(x, of(module, "weight"), padding=padding), f"{module}.norm")

    def up(x, module):
        return F.conv_transpose2d(x, of(module, "weight"), of(module, "bias"), stride=2)

    tokens = backbone.bottom_up(image)["tokens"]
    quarter = up(F.gelu(norm(up(tokens, "simfp_2.0"), "simfp_2.1")), "simfp_2.3")
    scaled = [quarter, up(tokens, "simfp_3.0"), tokens, F.max_pool2d(tokens, 2)]
    found = backbone(image)
    for level, x, first in zip("2345", scaled, (4, 1, 0, 1), strict=True):
        name = f"simfp_{level}"
        wanted = conv(conv(x, f"{name}.{first}", 0), f"{name}.{first + 1}", 1)
        torch.testing.assert_close(found[f"p{level}"], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["p6"], found["p5"][..., ::2, ::2], rtol=0, atol=0)
    assert used == set(state)


def test_weights_of_another_size_give_timms_own_tokens(tmp_path, caplog):
    """test_vit was made for 160 pixels; its positions are interpolated, all else is bit-equal."""
    whole = timm.create_model("test_vit").eval()  # any size: it resamples in each forward
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    cfg = vit_cfg(name="test_vit")
    cfg.MODEL.TIMM.PRETRAINED = str(tmp_path / "vit.pth")
    backbone = build_backbone(cfg).eval()
    assert "the weights expect INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [127.5" in caplog.text
    image = torch.rand(1, 3, SQUARE, SQUARE)
    options = {"indices": 1, "norm": False, "intermediates_only": True}
    with torch.no_grad():
        (wanted,) = whole.forward_intermediates(image, **options)
        found = backbone.bottom_up(image)["tokens"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    own = backbone.bottom_up.body.model.state_dict()
    assert own["pos_embed"].shape == (1, 65, 64) and whole.pos_embed.shape == (1, 101, 64)
    left_out = {"pos_embed", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert set(whole.state_dict()) - {k for k, v in own.items() if k != "pos_embed"} == left_out
    assert all(torch.equal(v, own[k]) for k, v in whole.state_dict().items() if k not in left_out)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda x: x.pop("blocks.3.norm1.weight"), "1 not in the file (blocks.3.norm1.weight)"),
        (lambda x: x.update(pos_embed=torch.zeros(1, 100, 64)), "(1, 100, 64) in the file"),
        (lambda x: x.update(other=torch.zeros(1)), "1 in the file only (other)"),
    ],
)
def test_other_weights_are_refused_in_one_line(damage, said, tmp_path):
    state = timm.create_model("test_vit").state_dict()
    damage(state)
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(UserError) as caught:
        VisionTransformer("test_vit", SQUARE, pretrained=str(tmp_path / "vit.pth"))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("MODEL.TIMM.PRETRAINED with MODEL.TIMM.NAME test_vit: ")


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("MODEL.TIMM.NAME", "resnet10t", "'resnet10t' is no vision transformer of patches of 16"),
        ("MODEL.TIMM.NAME", "vit_of_none", "'vit_of_none' is not a timm model (similar: "),
        ("MODEL.VIT.SQUARE", 96, "MODEL.VIT.SQUARE 96: expected a multiple of 64 pixels"),
        ("MODEL.VIT.SQUARE", 0, "MODEL.VIT.SQUARE 0: expected a multiple of 64 pixels"),
        ("MODEL.FPN.IN_FEATURES", ["res1"], "MODEL.FPN.IN_FEATURES ['res1']: expected"),
        ("MODEL.TIMM.TOP_BLOCK", "p6", "MODEL.TIMM.TOP_BLOCK 'p6': expected"),
        ("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.BACKBONE.FREEZE_AT is 2"),
    ],
)
def test_what_cannot_be_built_is_one_line(key, value, said):
    cfg = vit_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError) as caught:
        build_backbone(cfg)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"MODEL.TIMM.NORM": "GN"}, "MODEL.TIMM.NORM GN: build_vit_fpn_backbone has no batch nor"),
        ({"INPUT.MAX_SIZE_TRAIN": 129}, "INPUT.MAX_SIZE_TRAIN 129: images are padded to a square"),
        ({"INPUT.MAX_SIZE_TEST": 129}, "INPUT.MAX_SIZE_TEST 129: images are padded to a square of"),
        ({"TEST.AUG.ENABLED": True}, "TEST.AUG.MAX_SIZE 4000: images are padded to a square of 12"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused_at_setup(keys, said):
    cfg = vit_cfg()
    check_config(cfg)
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    with pytest.raises(UserError) as caught:
        check_config(cfg)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    cfg.MODEL.BACKBONE.NAME = get_fgd_cfg().MODEL.BACKBONE.NAME
    check_config(cfg)


def test_an_image_that_does_not_fit_is_refused_and_never_cropped():
    model = build_model(vit_cfg()).eval()
    with torch.no_grad():
        assert "instances" in model([{"image": torch.zeros(3, 128, 100)}])[0]
    said = "MODEL.VIT.SQUARE 128: an image is larger than that square, .* padded to 256x128"
    with torch.no_grad(), pytest.raises(UserError, match=said):
        model([{"image": torch.zeros(3, 129, 100)}])


def test_features_are_those_of_the_square_whatever_the_batch(make_batch):
    """Attention reads the padding, so an image alone and in a batch need one canvas."""
    model = build_model(vit_cfg()).eval()
    batch = make_batch([(64, 96), (128, 80)])
    images = model.preprocess_image(batch)
    assert images.tensor.shape[-2:] == (SQUARE, SQUARE)
    assert model.preprocess_image(batch[:1]).tensor.shape[-2:] == (SQUARE, SQUARE)
    with torch.no_grad():
        both = model.backbone(images.tensor)
        alone = model.backbone(model.preprocess_image(batch[:1]).tensor)
    for level, x in alone.items():
        torch.testing.assert_close(both[level][:1], x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_every_parameter_is_trained(arch, make_batch):
    model = build_model(vit_cfg(arch)).train()
    with EventStorage():
        losses = model(make_batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    assert [k for k, p in model.backbone.named_parameters() if p.grad is None] == []
