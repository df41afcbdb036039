import torch
from torch import nn

from deploy.graphs.norms import NamedGroupNorm, name_group_norms


def test_it_is_the_group_norm():
    norm = nn.GroupNorm(4, 12, eps=1e-2).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(NamedGroupNorm(norm)(x), norm(x))


def test_every_one_is_replaced_under_its_name_and_nothing_else():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(4, 4)))
    names = [name for name, _ in model.named_parameters()]
    name_group_norms(model)
    kinds = [type(model[0]), type(model[1][0]), type(model[1][1])]
    assert kinds == [NamedGroupNorm, nn.BatchNorm2d, NamedGroupNorm]
    assert [name for name, _ in model.named_parameters()] == names
