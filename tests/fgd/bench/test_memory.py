"""Every byte of cases that can be counted by hand."""

import pytest
import torch

from fgd.bench.memory import Bytes, trace, trace_halves

CPU = torch.device("cpu")
KB = 1024  # of 256 float32


def ones(kilobytes=1):
    return torch.ones(256 * kilobytes)


@pytest.fixture(autouse=True, scope="module")
def first_use():
    """What PyTorch allocates for good when something is first used."""
    trace(lambda: ones().requires_grad_().square().sum().backward(), CPU)


def test_peak_and_rest_of_a_sequence_of_temporaries():
    kept = []

    def work():
        first = ones(3)  # 3
        second = first.abs()  # 6
        del first  # 3
        kept.append(second[:128])  # a view holds all of it
        ones(1)  # 4, and back
        return "result"

    assert trace(work, CPU) == ("result", Bytes(6 * KB, 3 * KB))
    assert trace(lambda: kept[0].abs_(), CPU)[1] == Bytes(0, 0)


def test_releasing_what_was_there_before_counts_as_nothing():
    before = [ones(100)]
    assert trace(lambda: (before.clear(), ones(2))[1].numel(), CPU)[1] == Bytes(2 * KB, 0)


def test_an_address_that_is_used_again_does_not_confuse():
    """The profiler remembers sizes of blocks that were released while it was off."""
    big = []
    for _ in range(3):
        trace(lambda: big.append(ones(64)), CPU)
        big.clear()
        small = [ones(1) for _ in range(64)]  # very likely some at the big one's address
        assert trace(small.clear, CPU)[1] == Bytes(0, 0)


def test_halves_of_a_product():
    x, factor = ones(8).requires_grad_(), ones(8)

    def forward():  # x*factor: factor kept, not new; then its square root: kept
        return (x * factor).sqrt().sum()

    # Forward: product 8, root 16, product released 8, sum 4 bytes, which remains.
    # Backward: 4 bytes for the slope, the root's slope; then the product's own.
    memory = trace_halves(forward, lambda total: total.backward(), CPU)
    assert memory.held == 8 * KB + 4
    assert memory.peak >= 16 * KB + 4 and x.grad is not None
    x.grad = None
    linear = trace_halves(lambda: (x * factor).sum(), lambda total: total.backward(), CPU)
    # Held: the total. Peak: in forward the product and the total, in backward the gradient, the
    # total and its slope, which is expanded without memory.
    assert linear == Bytes(8 * KB + 8, 4)
    assert x.grad.shape == x.shape


def test_the_gradient_itself_counts_once():
    x = ones(16).requires_grad_()
    memory = trace_halves(lambda: x.sum(), lambda total: total.backward(), CPU)
    # An expanded slope becomes a real gradient of 16 KB.
    assert memory.held == 4 and 16 * KB <= memory.peak <= 16 * KB + 8
