import weakref

import pytest
import torch

from fgd.methods.gradients import held, with_gradient


def test_a_known_gradient_is_scaled_before_it_is_rounded():
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    gradient = torch.tensor([1e-9, 2e-9, 0.0])  # 0 in float16
    value = with_gradient(x, torch.tensor(5.0), gradient)
    assert value == 5 and value.dtype == torch.float32
    (1e6 * value).backward()
    torch.testing.assert_close(x.grad, (1e6 * gradient).half())
    assert x.grad.dtype == torch.float16 and x.grad[0] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_held_is_the_function_with_its_gradient_and_keeps_one_tensor(dtype):
    kept, seen = [], []
    x = torch.randn(4, 5).to(dtype).requires_grad_()

    def function(values):
        seen.append(values.dtype)
        return (values.exp() * values.sin()).square().sum()

    pack = lambda t: kept.append(weakref.ref(t)) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = held(function, x)
    wide = torch.promote_types(dtype, torch.float32)
    assert seen == [wide] and len(kept) > 3
    assert [t().shape for t in kept if t() is not None] == [x.shape]
    (3 * value).backward()
    plain = x.detach().to(wide).requires_grad_()
    (3 * function(plain)).backward()
    torch.testing.assert_close(value, function(plain).detach())
    torch.testing.assert_close(x.grad, plain.grad.to(dtype))
    with torch.no_grad():
        assert held(function, x) == value and not held(function, x).requires_grad
