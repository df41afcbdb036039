"""Graphs see each image of a padded batch as if it were alone."""

import copy

import pytest
import timm
import torch
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from torch import nn

from deploy.checks.tiny import conditioned, tiny_cfg
from deploy.graphs import exportable
from deploy.graphs.area import Area, _inside, extend, follow, inside
from deploy.graphs.means import Mean, write_out_means
from fgd.detectors.pyramids import group_norm

from .conftest import make_cfg, scenes

SIZES = [(96, 128), (96, 70), (50, 128), (33, 31), (1, 1)]


def alone(size, step=32):
    """Height and width of the map that Detectron2 makes of one image."""
    return tuple(-(-side // step) * step for side in size)


@pytest.mark.parametrize("stride", [1, 4, 32, 64, 128])
def test_inside_are_the_cells_of_the_image_alone(stride):
    height, width = (-(-side // stride) for side in (96, 128))
    found = inside(torch.tensor(SIZES, dtype=torch.int32), 32, stride, height, width)
    for cells, size in zip(found, SIZES):
        rows, columns = (-(-side // stride) for side in alone(size))
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[:rows, :columns] = True
        assert torch.equal(cells, expected)
    if stride == 1:  # to the pixel, where nothing is rounded up
        exact = inside(torch.tensor(SIZES), 1, 1, 96, 128)
        assert exact.sum(dim=(1, 2)).tolist() == [h * w for h, w in SIZES]


def test_extended_maps_repeat_the_last_cells_once():
    x = torch.arange(2 * 16.0).reshape(2, 1, 4, 4)
    found = extend(x, torch.tensor([[40, 64], [128, 128]]), 32, 32)
    assert found[0, 0].tolist() == [[0, 1, 1, 3], [4, 5, 5, 7], [4, 5, 5, 7], [12, 13, 13, 15]]
    assert torch.equal(found[1], x[1])


class Network(nn.Module):
    """Every kind of layer that reads neighbours, at strides 1 to 8; the last two share weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3), group_norm(8), nn.SiLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.block = nn.Sequential(
            SEModule(8, rd_channels=2), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.AvgPool2d(2)
        )
        self.shared = nn.Sequential(
            nn.Conv2d(8, 8, 5, padding=2), group_norm(8), EffectiveSEModule(8)
        )

    def forward(self, x):
        fine = self.stem(x)
        coarse = self.block(fine)
        return [fine, coarse, self.shared(fine), self.shared(coarse)]


def followed(network, step, side=64):
    """The network after `follow`, and its area."""
    network = copy.deepcopy(network)
    write_out_means(network)
    area = Area(step)
    follow(area, [network])
    with area.watch(side), area.of(torch.tensor([[side, side]])), torch.no_grad():
        network(torch.zeros(1, 3, side, side, dtype=torch.float64))
    return network, area


def test_every_layer_gives_what_it_gives_alone():
    torch.manual_seed(0)
    network = Network().double()
    network.block[0].fc2.bias.data.normal_(), network.stem[1].bias.data.normal_()
    padded, area = followed(network, step=16)
    images = torch.zeros(4, 3, 48, 64, dtype=torch.float64)
    sizes = torch.tensor([[48, 64], [48, 17], [20, 64], [9, 5]])
    for image, (height, width) in zip(images, sizes):
        image[:, :height, :width].normal_()
    for _ in range(2):  # the calls are counted anew
        with area.of(sizes), torch.no_grad():
            found = padded(images)
        for i, size in enumerate(sizes.tolist()):
            height, width = alone(size, 16)
            with torch.no_grad():
                expected = network(images[i : i + 1, :, :height, :width])
            for level, stride, wanted in zip(found, (4, 8, 4, 8), expected):
                own = level[i : i + 1, :, : height // stride, : width // stride]
                torch.testing.assert_close(own, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "seresnet18", "ese_vovnet19b_dw"])
def test_written_out_blocks_are_timms(name):
    torch.manual_seed(0)
    network = timm.create_model(name, features_only=True).eval().double()
    names = [name for name, _ in network.named_parameters()]
    written = copy.deepcopy(network)
    write_out_means(written)
    assert sum(isinstance(part, Mean) for part in written.modules()) >= 4
    assert [name for name, _ in written.named_parameters()] == names
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(written(x), network(x)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def squeezed(arch):
    return conditioned(make_cfg(arch))  # over MobileNetV3, which squeezes and excites


def with_resnet():
    """FCOS over Detectron2's ResNet-18, whose stem pools by a function."""
    cfg = tiny_cfg("FCOS")
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    return conditioned(cfg)


DETECTORS = {
    "RetinaNet": lambda: squeezed("RetinaNet"),
    "Faster R-CNN": lambda: squeezed("GeneralizedRCNN"),
    "FCOS": lambda: conditioned(tiny_cfg("FCOS")),
    "Mask R-CNN": lambda: conditioned(tiny_cfg("Mask R-CNN")),
    "FCOS, ResNet": with_resnet,
    "RepPoints": lambda: conditioned(tiny_cfg("RepPoints")),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_do_not_depend_on_the_canvas(name):
    """In double precision, beside other images, on a canvas of twice the size."""
    model = DETECTORS[name]()
    detector = exportable(model)
    detector.double()
    images = scenes(3, seed=5).double()
    large = torch.full((3, 3, 192, 256), 99.0, dtype=torch.float64)
    large[:, :, :96, :128] = images
    sizes = torch.tensor(SIZES[:3], dtype=torch.int32)
    with torch.no_grad():
        together = detector(large, sizes)[:4]
        for i, size in enumerate(SIZES[:3]):
            height, width = alone(size)
            single = detector(images[i : i + 1, :, :height, :width], sizes[i : i + 1])[:4]
            n = int(single[0])
            assert n == int(together[0][i]) and n > 3
            for found, expected in zip(together[1:], single[1:]):
                torch.testing.assert_close(
                    found[i, :n].double(), expected[0, :n].double(), rtol=0, atol=1e-9
                )


def test_a_cell_beyond_the_image_makes_no_detection():
    """Whose box would reach into it: FCOS with a centre just outside."""
    detector = exportable(DETECTORS["FCOS"]())
    logits = torch.zeros(1, 3, 12, 16)
    found = detector.only_inside(logits, 8, torch.tensor([[40, 128]]))
    assert (found[:, :, :8] == 0).all() and (found[:, :, 8:] < -1e29).all()
    assert [x.sum().item() for x in _inside(torch.tensor([[40, 128]]), 32, 8, 12, 16)] == [8, 16]
