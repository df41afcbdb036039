import torch

from fgd.methods.fgd.attention import channel_attention, spatial_attention
from tests import reference


def test_golden_vector():
    i = torch.arange(2 * 4 * 5 * 6, dtype=torch.float64)
    teacher = (torch.sin(0.37 * i + 2.0) + 0.2).view(2, 4, 5, 6)
    spatial = spatial_attention(teacher, 0.5)[0, 0, :3]
    channel = channel_attention(teacher, 0.5)[0]
    wanted = [1.1478388113817675, 1.156959346394795, 0.9656230890319988]
    torch.testing.assert_close(
        spatial, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0
    )
    wanted = [0.8981069503682507, 1.0753851003382122, 0.9804353537730831, 1.0460725955204544]
    torch.testing.assert_close(
        channel, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_mean_is_one_and_equals_the_reference():
    features = torch.randn(
        3, 5, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    spatial, channel = spatial_attention(features, 0.8), channel_attention(features, 0.8)
    torch.testing.assert_close(spatial.mean((1, 2)), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(channel.mean(1), torch.ones(3, dtype=torch.float64))
    wanted = reference.attention(features, 0.8)
    torch.testing.assert_close(spatial, wanted[0])
    torch.testing.assert_close(channel, wanted[1])


def test_one_cell_and_huge_responses():
    assert spatial_attention(torch.randn(1, 3, 1, 1), 0.5).item() == 1
    features = torch.zeros(1, 2, 3, 3)
    features[0, :, 1, 1] = 1e4
    spatial = spatial_attention(features, 0.5)
    assert spatial[0, 1, 1] == 9 and spatial.sum() == 9
