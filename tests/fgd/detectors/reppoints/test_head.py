import pytest
import torch
from torch.nn import functional as F

from fgd.detectors.reppoints.head import DeformConv, RepPointsHead


@pytest.fixture
def head():
    """8 channels, 3 classes, no norm, with weights large enough to move points."""
    head = RepPointsHead(channels=8, num_classes=3, num_convs=1, norm="").double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head


def test_offsets_of_zero_are_a_plain_convolution():
    layer = DeformConv(5, 6).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 5, 7, 9, dtype=torch.float64)
    plain = F.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(layer(x, torch.zeros(2, 18, 7, 9)), plain, atol=1e-13, rtol=0)


@pytest.mark.parametrize("tap", range(9))
def test_offsets_are_y_x_of_each_tap_in_the_order_of_the_kernel(tap):
    """The tap alone has weight, and is sent to one place: two rows up and one column right."""
    layer = DeformConv(1, 1).double()
    torch.nn.init.zeros_(layer.weight)
    layer.weight.data.view(-1)[tap] = 1.0
    x = torch.randn(1, 1, 9, 9, dtype=torch.float64)
    offsets = torch.zeros(1, 18, 9, 9, dtype=torch.float64)
    offsets[:, 2 * tap], offsets[:, 2 * tap + 1] = -2 - (tap // 3 - 1), 1 - (tap % 3 - 1)
    assert layer(x, offsets)[0, 0, 4, 4] == x[0, 0, 2, 5]


def test_deformable_convolution_is_float32_under_autocast():
    layer = DeformConv(5, 6)
    torch.nn.init.normal_(layer.weight)
    x, offsets = torch.randn(1, 5, 7, 9), torch.randn(1, 18, 7, 9)
    expected = layer(x, offsets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, offsets), expected)
        assert layer(x.bfloat16(), offsets).dtype == torch.bfloat16


def test_points_without_weights_lie_on_the_location_and_it_alone_is_sampled():
    head = RepPointsHead(channels=8, num_classes=3).double()
    torch.nn.init.zeros_(head.init_points.weight)
    torch.nn.init.normal_(head.cls_dcn.weight)
    x = torch.randn(1, 32, 6, 5, dtype=torch.float64)[:, :8]
    logits, first, refined = (levels[0] for levels in head([x]))
    assert first.shape == refined.shape == (1, 18, 6, 5) and not first.any()
    nine_times_the_middle = F.conv2d(
        head.cls_subnet(x), head.cls_dcn.weight.sum((2, 3), keepdim=True)
    )
    torch.testing.assert_close(logits, head.cls_score(nine_times_the_middle.relu()))


def test_it_follows_the_definition(head):
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    logits, first, refined = (levels[0] for levels in head([x]))
    points_feature = head.points_subnet(x)
    assert torch.equal(
        points_feature, F.conv2d(x, *head.points_subnet[0].parameters(), padding=1).relu()
    )
    torch.testing.assert_close(first, head.init_points(head.init_conv(points_feature).relu()))
    taps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    offsets = first - torch.tensor(taps).double().view(1, 18, 1, 1)
    for output, feature, layer, last in (
        (logits, head.cls_subnet(x), head.cls_dcn, head.cls_score),
        (refined - first, points_feature, head.refine_dcn, head.refine_points),
    ):
        torch.testing.assert_close(output, last(layer(feature, offsets).relu()))


def test_a_tenth_of_the_gradient_reaches_the_first_points(head):
    x = torch.randn(1, 8, 6, 5, dtype=torch.float64)
    logits, first, refined = (levels[0] for levels in head([x]))
    weights = torch.randn_like(logits), torch.randn_like(refined)
    free = first.detach().requires_grad_()
    offsets = free - head.regular
    plain = (
        head.cls_score(head.cls_dcn(head.cls_subnet(x), offsets).relu()),
        head.refine_points(head.refine_dcn(head.points_subnet(x), offsets).relu()),
    )
    for output, direct, weight in zip((logits, refined), plain, weights):
        (through,) = torch.autograd.grad((output * weight).sum(), first, retain_graph=True)
        (whole,) = torch.autograd.grad((direct * weight).sum(), free, retain_graph=True)
        assert whole.abs().max() > 1e-3
        torch.testing.assert_close(through, 0.1 * whole)


def test_levels_share_the_head_and_nothing_else(head):
    a, b = torch.randn(1, 8, 6, 5).double(), torch.randn(1, 8, 3, 2).double()
    for both, alone in zip(head([a, b]), head([b])):
        assert [x.shape[-2:] for x in both] == [(6, 5), (3, 2)]
        assert torch.equal(both[1], alone[0])


def test_shifted_features_give_shifted_predictions(head):
    torch.nn.init.uniform_(head.init_points.weight, -0.01, 0.01)
    torch.nn.init.uniform_(head.init_points.bias, -0.5, 0.5)
    x = torch.randn(1, 8, 16, 16, dtype=torch.float64)
    for here, there in zip(head([x]), head([x.roll((1, 2), (2, 3))])):
        inner = here[0][..., 6:-6, 6:-6]
        torch.testing.assert_close(there[0][..., 7:-5, 8:-4], inner)


def test_initial_weights():
    torch.manual_seed(0)
    head = RepPointsHead(channels=64, num_classes=3)
    convs = [head.cls_subnet[0], head.cls_dcn, head.refine_dcn, head.init_conv]
    for conv in convs:
        assert abs(conv.weight.std().item() - 0.01) < 3e-4 and abs(conv.weight.mean()) < 1e-3
    assert torch.allclose(head.cls_score.bias.sigmoid(), torch.tensor(0.01))
    assert head.cls_subnet[0].bias is None and isinstance(
        head.cls_subnet[0].norm, torch.nn.GroupNorm
    )
    assert not head.init_conv.bias.any() and not head.refine_points.bias.any()
    assert len(head.cls_subnet) == len(head.points_subnet) == 3
    assert "regular" not in head.state_dict()
