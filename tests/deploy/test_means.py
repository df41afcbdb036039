import onnxruntime as ort
import torch
from torch import nn

from deploy.graphs.means import NamedGroupNorm, write_out_means


def test_it_is_the_group_norm():
    norm = nn.GroupNorm(4, 12, eps=1e-2).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(NamedGroupNorm(norm)(x), norm(x))


def test_half_precision_is_left_for_the_statistics():
    """Squares of 300 are beyond float16, and so is their sum."""
    norm = NamedGroupNorm(nn.GroupNorm(2, 4))
    x = 300 * torch.randn(1, 4, 30, 40, generator=torch.Generator().manual_seed(0))
    found = norm.half()(x.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), norm.float()(x.half().float()), rtol=2e-3, atol=1e-3)


def test_a_nearly_flat_map_keeps_its_precision_in_onnx():
    """The mean is 1000 deviations; InstanceNormalization would be off by 5e-4."""
    norm = NamedGroupNorm(nn.GroupNorm(2, 4)).eval()
    x = 100 + 0.1 * torch.randn(1, 4, 96, 128, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(norm, (x,), dynamo=True, opset_version=18, verbose=False)
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    exact = nn.functional.group_norm(x.double(), 2)
    assert (torch.from_numpy(found) - exact).abs().max() < 3e-4


def test_every_one_is_replaced_under_its_name_and_nothing_else():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(4, 4)))
    names = [name for name, _ in model.named_parameters()]
    write_out_means(model)
    kinds = [type(model[0]), type(model[1][0]), type(model[1][1])]
    assert kinds == [NamedGroupNorm, nn.BatchNorm2d, NamedGroupNorm]
    assert [name for name, _ in model.named_parameters()] == names
