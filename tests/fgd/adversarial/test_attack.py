"""The attack against small losses whose gradients are known, and its distances."""

import math

import pytest
import torch

from fgd.adversarial.attack import Settings, attack, check_settings, diverse, grey_levels

MEAN = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
STDS = {
    "ones": torch.ones(3, 1, 1),
    "imagenet": torch.tensor([57.375, 57.12, 58.395]).view(3, 1, 1),
}
PLAIN = Settings(diversity_prob=0.0)


def draw(low=0, high=256, size=(12, 20), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (3, *size), generator=generator).to(torch.uint8)


def levels_by_hand(image, std, epsilon=8 / 255):
    """The largest whole change of each channel, from Python's numbers alone."""
    spans = [int(c.max()) - int(c.min()) for c in image]
    stds = [float(x) for x in std.flatten()]
    largest = max(span / s for span, s in zip(spans, stds))
    return [math.floor(epsilon * largest * s + 1e-6) for s in stds]


@pytest.mark.parametrize("std", STDS.values(), ids=STDS)
def test_distances_are_those_of_the_normalised_image_in_whole_levels(std):
    full = draw()
    full[:, 0, 0], full[:, 0, 1] = 0, 255
    assert grey_levels(full, std, 8 / 255).flatten().tolist() == levels_by_hand(full, std)
    for low, high in ((0, 256), (100, 140), (7, 8)):
        image = draw(low, high, seed=low)
        assert grey_levels(image, std, 8 / 255).flatten().tolist() == levels_by_hand(image, std)
    assert grey_levels(draw(7, 8), std, 8 / 255).max() == 0


def test_a_full_image_may_change_by_eight_levels():
    full = draw()
    full[:, 0, 0], full[:, 0, 1] = 0, 255
    assert grey_levels(full, STDS["ones"], 8 / 255).flatten().tolist() == [8, 8, 8]
    # 255 / 57.12 is the largest range; 8 / 57.12 * 57.375 and * 58.395
    assert grey_levels(full, STDS["imagenet"], 8 / 255).flatten().tolist() == [8, 8, 8]
    assert levels_by_hand(full, STDS["imagenet"], 40 / 255) == [40, 40, 40]
    assert levels_by_hand(full, STDS["imagenet"], 60 / 255) == [60, 60, 61]


@pytest.mark.parametrize("std", STDS.values(), ids=STDS)
@pytest.mark.parametrize("span", [(0, 256), (90, 160)], ids=["full", "narrow"])
def test_a_linear_loss_moves_every_pixel_as_far_as_it_may(span, std):
    """Its gradient is constant, so every step goes the same way: five of 2 exceed the 8 allowed."""
    image = draw(*span)
    signs = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(1)).sign()
    found = attack(image, MEAN, std, (12, 20), lambda x: (x * signs).sum(), PLAIN)
    assert found.dtype == torch.uint8 and found.shape == image.shape
    most = torch.tensor(levels_by_hand(image, std)).view(3, 1, 1)
    edges = [(c.min(), c.max()) for c in image]
    for channel, (low, high) in enumerate(edges):
        wanted = image[channel].int() + most[channel] * signs[channel].int()
        wanted = wanted.clamp(int(low), int(high))
        # What the network sees may stop between two levels.
        assert (found[channel].int() - wanted).abs().max() <= (0 if std is STDS["ones"] else 1)
    assert (found.int() - image.int()).abs().amax((1, 2)).tolist() == most.flatten().tolist()


def reference(image, mean, std, loss_gradient, settings):
    """The equations, pixel by pixel in Python, for a loss whose gradient is a function of x.

    Args:
        loss_gradient: of nested lists [c][y][x] of normalised values; returns the same.
    """
    shape = range(image.shape[0]), range(image.shape[1]), range(image.shape[2])
    cells = [(c, y, x) for c in shape[0] for y in shape[1] for x in shape[2]]
    m, s = mean.flatten().tolist(), std.flatten().tolist()
    start = {k: (float(image[k]) - m[k[0]]) / s[k[0]] for k in cells}
    low = [min(v for k, v in start.items() if k[0] == c) for c in shape[0]]
    high = [max(v for k, v in start.items() if k[0] == c) for c in shape[0]]
    reach = max(b - a for a, b in zip(low, high))
    now, momentum = dict(start), dict.fromkeys(cells, 0.0)
    for _ in range(settings.steps):
        gradient = loss_gradient(now)
        norm = sum(abs(v) for v in gradient.values())
        momentum = {k: gradient[k] / norm + settings.momentum * momentum[k] for k in cells}
        for k in cells:
            sign = (momentum[k] > 0) - (momentum[k] < 0)
            moved = now[k] + settings.step * reach * sign
            edge = settings.epsilon * reach
            now[k] = min(max(moved, low[k[0]], start[k] - edge), high[k[0]], start[k] + edge)
    return {k: (now[k] - start[k]) * s[k[0]] for k in cells}


@pytest.mark.parametrize("momentum", [0.0, 1.0])
@pytest.mark.parametrize("std", STDS.values(), ids=STDS)
def test_it_is_the_equations(std, momentum):
    """Of a loss that is curved, so that steps turn round: -(x - t)^4 with its own target t."""
    image, target = draw(size=(3, 4)), draw(size=(3, 4), seed=2).double()
    target = (target - MEAN.double()) / std.double()
    near = (image.double() - MEAN.double()) / std.double()
    target = near + (target - near) * 0.06  # within reach of few steps
    settings = PLAIN._replace(momentum=momentum, step=1.7 / 255)

    def loss(seen):
        x = (seen - MEAN.double()) / std.double()
        return -((x - target) ** 4).sum()

    def gradient(now):
        return {k: -4 * (v - float(target[k])) ** 3 for k, v in now.items()}

    found = attack(image, MEAN.double(), std.double(), (3, 4), loss, settings)
    wanted = reference(image, MEAN.double(), std.double(), gradient, settings)
    changes = {k: int(found[k]) - int(image[k]) for k in wanted}
    most = levels_by_hand(image, std)

    def whole(exact):
        return {k: min(max(round(v), -most[k[0]]), most[k[0]]) for k, v in exact.items()}

    assert changes == whole(wanted)
    assert len(set(changes.values())) > 4, "vacuous: all pixels moved alike"
    other = reference(
        image, MEAN.double(), std.double(), gradient, settings._replace(momentum=1 - momentum)
    )
    assert changes != whole(other), "vacuous: momentum makes no difference"


def test_the_distance_is_never_left_whatever_the_loss():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        low = int(torch.randint(0, 200, (), generator=generator))
        high = int(torch.randint(low + 1, 257, (), generator=generator))
        image = draw(low, high, (9, 11), seed)
        std = STDS["imagenet"] if seed % 2 else STDS["ones"]
        weight = torch.randn(4, 3, 3, 3, generator=generator)
        loss = lambda x: torch.conv2d(x[None] / 50, weight).sin().sum()  # noqa: B023, E731
        settings = Settings(epsilon=(1 + seed) / 255, step=3 / 255)
        found = attack(image, MEAN, std, (13, 16), loss, settings)
        most = levels_by_hand(image, std, settings.epsilon)
        change = (found.int() - image.int()).abs().amax((1, 2)).tolist()
        assert all(a <= b for a, b in zip(change, most)), (change, most)
        for own, given in zip(found, image):
            assert own.min() >= given.min() and own.max() <= given.max()


def test_a_loss_without_gradient_and_a_uniform_image_change_nothing():
    image = draw()
    assert torch.equal(
        attack(image, MEAN, STDS["ones"], (12, 20), lambda x: 0 * x.sum(), PLAIN), image
    )
    uniform = draw(7, 8)
    found = attack(uniform, MEAN, STDS["ones"], (12, 20), lambda x: x.sum(), PLAIN)
    assert torch.equal(found, uniform)


def test_the_loss_sees_the_size_of_the_network_and_pixels_of_the_file_change():
    image, sizes = draw(), []

    def loss(seen):
        sizes.append(tuple(seen.shape))
        assert -1 < seen.min() and seen.max() < 256  # what a detector takes
        return -((seen - 128) ** 2).sum()

    found = attack(image, MEAN, STDS["imagenet"], (24, 40), loss, PLAIN)
    assert sizes == [(3, 24, 40)] * 5 and found.shape == image.shape
    # Towards grey, so distances to it fall.
    assert ((found.int() - 128).abs().sum()) < ((image.int() - 128).abs().sum())


def test_diversity_is_a_square_on_zeros():
    image = torch.rand(3, 30, 50) + 1
    torch.manual_seed(0)
    changed, sides, places = 0, set(), set()
    for _ in range(400):
        seen = diverse(image, 0.5, 0.9)
        if seen is image:
            continue
        changed += 1
        assert seen.shape == (3, 50, 50)
        rows, columns = ((seen[0] != 0).any(dim=d).nonzero().flatten() for d in (1, 0))
        side = len(rows)
        assert side == len(columns) and 45 <= side < 50
        assert int(rows[-1]) - int(rows[0]) == side - 1  # one piece
        sides.add(side)
        places.add((int(rows[0]), int(columns[0])))
        assert seen[:, rows][:, :, columns].min() >= 1
    assert changed / 400 == pytest.approx(0.5, abs=0.08)
    assert sides == set(range(45, 50)) and len(places) > 8
    assert diverse(image, 1.0, 1.0) is image  # nothing between W and W
    assert diverse(image, 0.0, 0.9) is image


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epsilon": -0.1}, "epsilon -0.1 is not a finite"),
        ({"step": float("nan")}, "step nan is not a finite"),
        ({"momentum": float("inf")}, "momentum inf is not a finite"),
        ({"steps": 0}, "steps 0 is not at least 1"),
        ({"diversity_prob": 1.1}, "diversity_prob 1.1 is not a probability"),
        ({"diversity_rate": 0.0}, "diversity_rate 0.0 is not above 0"),
    ],
)
def test_settings_that_cannot_be_meant(changes, message):
    assert check_settings(Settings()) == ""
    assert check_settings(Settings()._replace(**changes)).startswith(message)
