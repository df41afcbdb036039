import gc
import weakref

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import build_backbone
from torch import nn

from fgd.distillation.taps import FeatureTap, Source, choose_sources, find_norm, read_levels
from fgd.errors import UserError

PARTNERS = {name: name for name in ("p3", "p4", "p5", "p6", "p7")}


class Doubling(nn.Module):
    def forward(self, x):
        return {"p3": x * 2}


def test_tap_hands_out_once_and_only_training_features():
    backbone = Doubling()
    tap = FeatureTap(backbone)
    backbone(torch.ones(1, 3, 4, 5))
    features, padded_size = tap.pop()
    assert features["p3"].unique().item() == 2 and padded_size == (4, 5)
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()
    backbone.eval()(torch.ones(1, 3, 4, 5))
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()


@pytest.fixture
def backbone(tiny_cfg):
    """Factory of a tiny FPN p3-p7 with a norm."""

    def make(norm="GN", arch="RetinaNet"):
        cfg = tiny_cfg(arch, channels=32)
        cfg.MODEL.FPN.NORM = norm
        return build_backbone(cfg)

    return make


IMAGES = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)


def test_norms_are_found_where_the_level_ends(backbone):
    neck = backbone()
    assert [find_norm(neck, name) for name in PARTNERS] == [
        *(f"fpn_output{k}.norm" for k in (3, 4, 5)),
        "",
        "",
    ]
    assert find_norm(backbone(""), "p3") == ""
    neck.top_block.p6 = Conv2d(32, 32, 3, 2, 1, bias=False, norm=nn.GroupNorm(4, 32))
    assert find_norm(neck, "p6") == "top_block.p6.norm"


def test_every_level_of_reppoints_ends_in_a_norm(tiny_cfg):
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.NORM = "build_reppoints_timm_fpn_backbone", "GN"
    neck = build_backbone(cfg).eval()
    sources, _ = choose_sources("auto", neck, neck, PARTNERS)
    output = neck(IMAGES)
    for level, value in read_levels(neck, IMAGES, sources)[0].items():
        torch.testing.assert_close(neck.get_submodule(sources[level].norm)(value), output[level])
        assert not torch.allclose(value, output[level], atol=0.1)


def test_auto_is_before_group_normalisation_of_either_side(backbone):
    group, batch, plain = (backbone(norm) for norm in ("GN", "BN", ""))

    def sources(*sides, kind="auto"):
        return [
            [bool(source.norm) for source in side.values()]
            for side in choose_sources(kind, *sides, PARTNERS)
        ]

    fpn, none = [True, True, True, False, False], [False] * 5
    assert sources(group, group) == [fpn, fpn]
    assert sources(group, plain) == [fpn, none] and sources(plain, group) == [none, fpn]
    assert sources(batch, group) == [fpn, fpn]
    assert sources(batch, plain) == [none, none]
    assert sources(batch, plain, kind="pre_norm") == [fpn, none]
    assert sources(group, group, kind="output") == [none, none]
    with pytest.raises(UserError, match="no distilled level of student or teacher ends in a norm"):
        sources(plain, plain, kind="pre_norm")
    with pytest.raises(UserError, match="pre_norm: no distilled level"):
        choose_sources("pre_norm", group, group, {"p6": "p6"})
    with pytest.raises(UserError, match="FEATURES: 'post' is not one of auto, output, pre_norm"):
        sources(plain, plain, kind="post")


def test_what_is_read_is_the_last_convolutions_result(backbone):
    neck = backbone().train()
    _, sources = choose_sources("auto", neck, neck, PARTNERS)
    output = neck(IMAGES)
    features, _ = read_levels(neck, IMAGES, sources)
    for level in ("p3", "p4", "p5"):
        norm = neck.get_submodule(f"fpn_output{level[1:]}").norm
        assert not torch.allclose(features[level], output[level], atol=0.1)
        torch.testing.assert_close(norm(features[level]), output[level])
    assert features["p6"].min() < 0  # not after the ReLU
    torch.testing.assert_close(features["p7"], neck.top_block.p7(features["p6"].relu()))
    hooks = [m for m in neck.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks  # none stays behind


def test_the_tap_takes_the_same_and_the_gradient_of_both_uses(backbone):
    neck = backbone().train()
    sources, _ = choose_sources("auto", neck, neck, PARTNERS)
    tap = FeatureTap(neck, sources)
    output = neck(IMAGES)
    features, size = tap.pop()
    assert size == (64, 96) and list(features) == list(PARTNERS)
    weight = neck.fpn_output3.weight
    own, heads = features["p3"].square().sum(), output["p3"][..., :2].sum()
    (both,) = torch.autograd.grad(own + heads, weight, retain_graph=True)
    parts = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (own, heads)]
    assert all(part.abs().sum() > 0 for part in parts)
    torch.testing.assert_close(both, sum(parts), rtol=1e-4, atol=1e-3)


def test_nothing_is_held_after_it_was_handed_out(backbone):
    neck = backbone().train()
    sources, _ = choose_sources("auto", neck, neck, {"p3": "p3", "p6": "p6"})
    tap = FeatureTap(neck, sources)
    neck(IMAGES)
    features, _ = tap.pop()
    maps = [weakref.ref(x) for x in features.values()]
    del features
    gc.collect()
    assert [x() for x in maps] == [None, None]
    neck.eval()(IMAGES)  # evaluation records nothing, before a norm either
    assert not tap._recorder._inputs


def test_sources_rename_and_choose():
    sources = {"a": Source("p3")}
    features, _ = read_levels(Doubling(), torch.ones(1, 3, 2, 2), sources)
    assert list(features) == ["a"] and str(sources["a"]) == "p3"
    assert str(Source("p3", "fpn_output3.norm")) == "p3 before fpn_output3.norm"
