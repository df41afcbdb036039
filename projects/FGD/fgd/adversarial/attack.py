"""DI2-FGSM: the pixels that raise a detector's classification loss most, within a small distance.

Sources: momentum of MI-FGSM (CVPR 2018, arXiv 1710.06081), input diversity of DI2-FGSM (CVPR 2019,
arXiv 1803.06978), constants of IKD (ACM MM 2023, arXiv 2209.09841). With x an image in the
network's normalised space, R its largest range max_c (max x_c - min x_c), and J the loss:

    g_0 = 0,  g_t = grad J(D(x_t)) / |grad J(D(x_t))|_1 + mu g_{t-1}
    x_{t+1} = clip(x_t + alpha R sign g_t)

where the clip keeps x_t within epsilon R of x_0 and within the range of each of its channels, and D
is the random change of `diverse`. Nothing is added at random before the first step.

Where we differ from IKD's code: it attacks images at the network's resolution. Here x has the
resolution of the image file, and resizing it to the network's is the first part of J: so what is
bounded and stored is the file's own pixels, to which training then applies the augmentations of the
first image. Stored pixels are whole numbers: see `grey_levels`.
"""

import math
from typing import Callable, NamedTuple, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Settings(NamedTuple):
    """Distances are parts of an image's range: 8 / 255 is 8 grey levels of one that has all."""

    epsilon: float = 8 / 255
    step: float = 2 / 255  # alpha
    steps: int = 5
    momentum: float = 1.0  # mu
    diversity_prob: float = 0.5
    diversity_rate: float = 0.9


def grey_levels(image: Tensor, std: Tensor, epsilon: float) -> Tensor:
    """(C, 1, 1): by how many whole grey levels each channel may change.

    That is floor(epsilon R std_c), so rounding never leaves the distance allowed.

    Args:
        image: (C, H, W) of 0..255. std: (C, 1, 1), what the network divides channels by.
    """
    exact = image.double().flatten(1)
    # A mistake of 1e-9 must not turn 8 levels into 7.
    return torch.floor(epsilon * _range(exact, std) * std.double() + 1e-6)


def _range(channels: Tensor, std: Tensor) -> Tensor:
    """R of (C, P) pixels that are not normalised yet."""
    return ((channels.amax(1) - channels.amin(1)) / std.flatten().to(channels)).max()


def diverse(image: Tensor, prob: float, rate: float) -> Tensor:
    """With probability ``prob`` the (C, H, W) image as a smaller square, padded with zeros.

    Its side is drawn from [rate W, W), the whole is W by W, and where in it the square is, is drawn
    too. Boxes are not moved with it: so does IKD, and its images are made to mislead all the more
    places.
    """
    width = image.shape[-1]
    smallest = int(width * rate)
    if smallest >= width or torch.rand(()) >= prob:
        return image
    side = int(torch.randint(smallest, width, ()))
    square = F.interpolate(image[None], size=(side, side), mode="bilinear", align_corners=False)[0]
    rest = width - side
    top, left = (int(torch.randint(0, rest, ())) for _ in range(2))
    return F.pad(square, (left, rest - left, top, rest - top))


def attack(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    size: Tuple[int, int],
    loss: Callable[[Tensor], Tensor],
    settings: Settings,
) -> Tensor:
    """An image that raises ``loss``, of the size and dtype of the given one.

    Random numbers are torch's global ones. Where the loss has no gradient the image stays as it is.

    Args:
        image: (C, H, W) uint8. mean, std: (C, 1, 1) of the network, on its device.
        size: (height, width) that the network sees it at.
        loss: of an image (C, h, w) of 0..255 that is not normalised; differentiable.
    """
    pixels = image.to(mean)
    start = (pixels - mean) / std
    reach = _range(pixels.flatten(1), std)
    low, high = (edge[:, None, None] for edge in torch.aminmax(start.flatten(1), dim=1))
    low = torch.maximum(low, start - settings.epsilon * reach)
    high = torch.minimum(high, start + settings.epsilon * reach)
    found, direction = start, torch.zeros_like(start)
    for _ in range(settings.steps):
        found = found.detach().requires_grad_()
        seen = diverse(_resize(found, size), settings.diversity_prob, settings.diversity_rate)
        (gradient,) = torch.autograd.grad(loss(seen * std + mean), found)
        norm = gradient.abs().sum().clamp_min(torch.finfo(gradient.dtype).tiny)
        direction = gradient / norm + settings.momentum * direction
        moved = found.detach() + settings.step * reach * direction.sign()
        found = torch.minimum(torch.maximum(moved, low), high)
    most = grey_levels(image, std.cpu(), settings.epsilon)
    change = ((found.detach() - start) * std).cpu().double().round().clamp(-most, most)
    return (image.double() + change).to(image.dtype)


def _resize(image: Tensor, size: Tuple[int, int]) -> Tensor:
    """As Pillow's bilinear resize of the test pipeline, which averages where it shrinks."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    options = {"mode": "bilinear", "antialias": True, "align_corners": False}
    return F.interpolate(image[None], size=tuple(size), **options)[0]


def check_settings(settings: Settings) -> str:
    """What is wrong with them; "" if nothing is."""
    for name in ("epsilon", "step", "momentum"):
        value = getattr(settings, name)
        if not (value >= 0 and math.isfinite(value)):
            return f"{name} {value} is not a finite number >= 0"
    if settings.steps < 1:
        return f"steps {settings.steps} is not at least 1"
    if not 0 <= settings.diversity_prob <= 1:
        return f"diversity_prob {settings.diversity_prob} is not a probability"
    if not 0 < settings.diversity_rate <= 1:
        return f"diversity_rate {settings.diversity_rate} is not above 0 and at most 1"
    return ""
